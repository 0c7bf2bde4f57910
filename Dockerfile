# Images of the project, one target each:
#
#   docker build --target operator .     the operator: no compiler, no package manager of Python
#   docker build --target trainer .      the program in the job's pods: torch for CUDA and CPU, DeepSpeed with compiled ops
#
# Build arguments: BASE (a Debian with Python 3.11 or newer), UV_VERSION, FLASH_ATTN=1 (needs a BASE with nvcc, and an hour).
# A build behind a proxy with a certificate authority of its own gives the bundle as a secret, which no layer keeps:
#   --secret id=ca-bundle,src=/path/to/ca-bundle.crt
#
# Dependencies come from uv.lock, with hashes, in layers that only a change of *their* versions rebuilds: an edit of code,
# of a tool's configuration or of a development dependency moves a few hundred kilobytes.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS tools
ARG UV_VERSION=0.13.9
RUN --mount=type=secret,id=ca-bundle \
    if [ -s /run/secrets/ca-bundle ]; then export PIP_CERT=/run/secrets/ca-bundle; fi \
    && python3 -m venv /tmp/venv \
    && /tmp/venv/bin/pip install --quiet --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}" \
    && mkdir /tools && mv /tmp/venv/bin/uv /tools/uv && rm -rf /tmp/venv
COPY images/install /tools/install

FROM tools AS lock
ARG FLASH_ATTN=0
WORKDIR /lock
COPY pyproject.toml uv.lock ./
# Heavy and slow to move first: torch with CUDA, then the rest, then what is compiled against torch.
RUN --mount=type=secret,id=ca-bundle \
    if [ -s /run/secrets/ca-bundle ]; then export SSL_CERT_FILE=/run/secrets/ca-bundle; fi \
    && export="/tools/uv export --quiet --locked --no-dev --no-emit-project --no-annotate --no-header" \
    && $export --extra operator > operator.txt \
    && $export --extra trainer > all.txt \
    && if [ "$FLASH_ATTN" = 1 ]; then $export --extra trainer --extra flash-attn > all.txt; fi \
    && awk '/^[^ ]/ {keep = /^(cuda-|nvidia-c|nvidia-n|torch==|triton==)/} keep' all.txt > torch.txt \
    && awk '/^[^ ]/ {keep = /^(deepspeed|flash-attn)==/} keep' all.txt > compiled.txt \
    && awk '/^[^ ]/ {keep = !/^(cuda-|nvidia-c|nvidia-n|torch==|triton==|deepspeed==|flash-attn==)/} keep' all.txt > trainer.txt

FROM ${BASE} AS operator
COPY --from=lock /lock/operator.txt /opt/requirements/
RUN --mount=type=bind,from=tools,source=/tools,target=/tools \
    --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=ca-bundle \
    /tools/install /opt/requirements/operator.txt \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/share/python-wheels \
    && echo 'operator:x:65532:65532::/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'operator:x:65532:' >> /etc/group
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/app PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /app
COPY operator/finetune_api finetune_api
COPY operator/finetune_operator finetune_operator
RUN chmod -R a+rX /app && python -m compileall -q /app
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["python", "-m", "finetune_operator"]

FROM ${BASE} AS trainer
# Triton and torch.compile call a C compiler and need Python's headers while a job runs; DeepSpeed's ops need them here.
RUN apt-get update -qq \
    && headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends gcc g++ libc6-dev \
       $([ -e "$headers/Python.h" ] || echo python3-dev) > /dev/null \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && echo 'trainer:x:1000:1000::/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'trainer:x:1000:' >> /etc/group
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin
COPY --from=lock /lock/torch.txt /opt/requirements/
RUN --mount=type=bind,from=tools,source=/tools,target=/tools \
    --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=ca-bundle \
    /tools/install /opt/requirements/torch.txt
COPY --from=lock /lock/trainer.txt /opt/requirements/
RUN --mount=type=bind,from=tools,source=/tools,target=/tools \
    --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=ca-bundle \
    /tools/install /opt/requirements/trainer.txt
# Compiled against the installed torch. DeepSpeed uses a prebuilt op only where its accelerator is the one of the build;
# its CPU Adam is plain C++ and serves both, so the comparison is answered by the machine that asks.
COPY images/portable-c++ /usr/local/bin/portable-c++
COPY --from=lock /lock/compiled.txt /opt/requirements/
RUN --mount=type=bind,from=tools,source=/tools,target=/tools \
    --mount=type=secret,id=ca-bundle \
    CXX=portable-c++ DS_ACCELERATOR=cpu DS_BUILD_CPU_ADAM=1 \
    /tools/install /opt/requirements/compiled.txt --no-cache --no-build-isolation \
    && cd /opt/venv/lib/python3*/site-packages/deepspeed \
    && printf '%s\n' 'from deepspeed.accelerator import get_accelerator' 'accelerator_name = get_accelerator()._name' \
       >> git_version_info_installed.py \
    && DS_ACCELERATOR=cpu python -m compileall -q git_version_info_installed.py
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /app
COPY operator/finetune_api finetune_api
COPY trainer_image/finetune_trainer finetune_trainer
RUN chmod -R a+rX /app && python -m compileall -q /app
USER 1000:1000
EXPOSE 8080
ENTRYPOINT ["python", "-m", "finetune_trainer"]
