# A server for one model on the CPU; see docs/serving.md.
FROM python:3.12-slim-bookworm AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim-bookworm
# Libraries of OpenCV.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
# From PyPI, torch would bring the libraries of CUDA.
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[serve]"
RUN useradd --create-home --uid 10001 semseg
USER semseg
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD \
    ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# Outside the container only the published port is reachable.
ENTRYPOINT ["mit-semseg", "serve", "--host", "0.0.0.0", "--gpu", "cpu"]
