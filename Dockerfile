# The page and its HTTP API on a processor: docker build -t ming . && docker run -p 7860:7860 -v ming-cache:/cache -v ming-data:/data ming
FROM python:3.12-slim

# An index with the CPU build of torch keeps several GB of GPU libraries out:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<the index that pytorch.org names for "Pip, CPU"> .
# pip takes it from the environment; the bounds in requirements.txt let either build in.
ARG PIP_EXTRA_INDEX_URL=""

# Owned by the user before VOLUME: a new volume takes the owner of the folder in the image.
RUN useradd --create-home --uid 1000 ming \
    && mkdir /cache /data \
    && chown ming:ming /cache /data

WORKDIR /app

# From what changes seldom to what changes often.
COPY requirements.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY weights ./weights
COPY examples ./examples
COPY app.py LICENSE README.md ./
COPY ming_app ./ming_app

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MING_CACHE_DIR=/cache \
    MING_DATA_DIR=/data

# A number, so that an orchestrator can see that it is not root.
USER 1000
VOLUME ["/cache", "/data"]
EXPOSE 7860

# Answers while the model still loads; whether it is loaded is said by /ready.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('MING_PORT', '7860') + '/health', timeout=5)"]

CMD ["python", "-m", "ming_app", "serve", "--host", "0.0.0.0"]
