# As Docker sets them for its containers.
echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start
echo '0 2147483647' >/proc/sys/net/ipv4/ping_group_range
