# local-rerank on CPUs: about 1 GB (docs/containers.md). Dockerfile.gpu is the same for NVIDIA GPUs.
#
#   docker build -t local-rerank .
#   docker run -p 127.0.0.1:8000:8000 -v ./key.txt:/run/key:ro -e LOCAL_RERANK_API_KEY_FILE=/run/key \
#       -v /srv/models/Qwen3-Reranker-0.6B:/models/served:ro -e LOCAL_RERANK_MODEL=/models/served local-rerank
#
# Or `docker compose up`, with compose.yaml. Without a model the small built-in one is served. Without a key it does not
# start, unless -e LOCAL_RERANK_INSECURE=true says that everyone who reaches the port may use it. The build arguments
# BASE, HASHES, MODEL and REVISION mean the same as in Dockerfile.gpu.

# The Python that the tests ran with. The environment is built in a stage of its own, so that neither uv nor what it
# removes again is in the image.
ARG BASE=python:3.11-slim
FROM ${BASE} AS build
RUN pip install --no-cache-dir uv==0.13.9

WORKDIR /opt/local-rerank
ARG HASHES=""
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ${HASHES} ./
COPY local_rerank local_rerank
COPY server server
ENV UV_NO_CACHE=1 \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/venv
RUN uv venv /opt/venv \
    && if [ -n "$HASHES" ]; then \
        uv pip install --torch-backend=cpu --require-hashes --requirement "$HASHES" \
        && uv pip install --no-index --no-deps --no-build-isolation .; \
    else \
        uv pip install --torch-backend=cpu --constraint constraints.txt .; \
    fi

# 190 MB of torch that only compilers and torch's own tests use. Then a first run: it shows that the environment works,
# and compiles the modules that are imported (compiling all of them would add 240 MB).
RUN torch=$(echo /opt/venv/lib/python3*/site-packages/torch) \
    && rm -r "$torch/include" "$torch/test" \
    && find "$torch/bin" -type f ! -name torch_shm_manager -delete \
    && /opt/venv/bin/local-rerank rank query document \
    && /opt/venv/bin/python -c "import local_rerank_server.process"

FROM ${BASE}
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

ENV HF_HOME=/models/hub
ARG MODEL=""
ARG REVISION=main
RUN mkdir -p /models/hub \
    && if [ -n "$MODEL" ]; then hf download "$MODEL" --revision "$REVISION"; fi

# From here on nothing is asked of the network, and nothing reports home.
ENV HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DO_NOT_TRACK=1 \
    XDG_CACHE_HOME=/models/cache \
    LOCAL_RERANK_MODEL=${MODEL:-local-rerank-nano} \
    LOCAL_RERANK_REVISION=${MODEL:+${REVISION}} \
    LOCAL_RERANK_DEVICE=cpu \
    LOCAL_RERANK_HOST=0.0.0.0 \
    LOCAL_RERANK_PORT=8000

# A volume at /models gets this owner when it is new. A number, because Kubernetes checks it (runAsNonRoot).
RUN useradd --system --no-create-home --uid 10001 local-rerank \
    && install --directory --owner=local-rerank /models /models/hub /models/cache
USER 10001
WORKDIR /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["local-rerank"]
CMD ["serve"]
