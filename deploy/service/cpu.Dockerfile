# syntax=docker/dockerfile:1
# Headway on CPU cores: docker build -f deploy/service/cpu.Dockerfile -t headway-cpu .
# docs/docker.md says how it is run. Never built where this was written: there was no Docker.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS build

# A C compiler for the core. Debian has one version of it at a time.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv==0.13.9 && python -m venv --without-pip /opt/headway
ENV UV_PYTHON=/opt/headway/bin/python UV_NO_CACHE=1 UV_HTTP_TIMEOUT=300

WORKDIR /src
COPY deploy/locks/cpu-image.txt deploy/locks/
# PyTorch's CPU build is on its own index alone.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN uv pip install --no-deps --compile-bytecode --default-index https://download.pytorch.org/whl/cpu \
        "$(grep '^torch==' deploy/locks/cpu-image.txt | cut -d' ' -f1)" \
 && uv pip install --no-deps --compile-bytecode -r deploy/locks/cpu-image.txt

# What changes often comes last: the wheel, with the core compiled.
COPY pyproject.toml MANIFEST.in README.md LICENSE ./
COPY deploy deploy
COPY router router
COPY serving serving
RUN uv build --wheel --out-dir dist \
 && uv pip install --no-deps --compile-bytecode dist/*.whl

FROM python:${PYTHON}-slim-bookworm
# With g++ PyTorch compiles for the CPU, and vLLM's kernels for it need libnuma.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --user-group --create-home headway \
 && install -d -o headway -g headway /models /home/headway/.cache
COPY --from=build /opt/headway /opt/headway
COPY deploy/service/container.yaml /etc/headway/config.yaml

ENV PATH=/opt/headway/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models/huggingface
# By number, so that Kubernetes sees that it is not root.
USER 1000:1000
WORKDIR /home/headway
EXPOSE 8000
# It is up when an engine takes requests: minutes, with a large model.
HEALTHCHECK --start-period=15m --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["headway"]
CMD ["serve", "/etc/headway/config.yaml"]
