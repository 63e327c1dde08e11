"""What people and programs speak to: the gRPC server, its client, the command line.

Never touches Docker. Imports go cli → server, client → errors, pem, pb.
"""
