# The image of jobs/rayjob.yaml, built in the repository's folder:
#   docker build --file jobs/rayjob.Dockerfile --tag REGISTRY/sr4ir:ray-2.60.0 .
FROM rayproject/ray:2.60.0-py311-gpu
WORKDIR /opt/sr4ir_dist
COPY --chown=ray pyproject.toml ./
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --python "$(which python)" --no-cache --compile-bytecode \
        "ray[data,default,train,tune]==2.60.0" "torch==2.15.0" "torchvision==0.29.2" \
        "deepspeed==0.19.8" --requirements pyproject.toml
COPY --chown=ray sr4ir_dist sr4ir_dist
COPY --chown=ray jobs jobs
COPY --chown=ray tune_spaces tune_spaces
ENV PYTHONPATH=/opt/sr4ir_dist PYTHONDONTWRITEBYTECODE=1
# DeepSpeed's CPU operator, for nodes without a GPU.
RUN python -c 'from sr4ir_dist.training.engines import build_cpu_operator; build_cpu_operator()'
