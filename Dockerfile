# `template-manager api`, `rest` and `worker` as a container. A KVM host needs root, Docker
# and devices: it runs from a checkout (docs/operations.md).
#
#   docker build -t template-manager .
#   docker run --rm template-manager --help

# Any image with Python 3.11 or newer and its venv module.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
RUN python3 -m venv /opt/template-manager
ENV PATH=/opt/template-manager/bin:$PATH
# Before the sources: a change of these does not install everything again.
COPY requirements.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY activities activities
COPY workflows workflows
COPY api api
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps .

FROM ${BASE_IMAGE}
COPY --from=build /opt/template-manager /opt/template-manager
ENV PATH=/opt/template-manager/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TEMPLATE_MANAGER_HEALTH_ADDRESS=127.0.0.1:9465
# A number, so that Kubernetes can see that it is not root. It needs no home and writes nothing.
USER 10001:10001
EXPOSE 5008 5009
HEALTHCHECK --interval=10s --timeout=12s --start-period=20s \
    CMD ["template-manager", "health"]
ENTRYPOINT ["template-manager"]
CMD ["--help"]
