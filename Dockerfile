# docmill's worker and command. Every dependency comes as a wheel, so no compiler is ever in the image.
FROM python:3.13-slim AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/docmill
# First what changes seldom: the pinned dependencies stay in their layer while the code changes.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
 && /opt/docmill/bin/pip install --only-binary=:all: -c constraints.txt -r requirements.txt
COPY procrastinate_app.py ./
COPY jobs jobs
COPY models models
COPY sql sql
RUN /opt/docmill/bin/pip install --no-deps .

FROM python:3.13-slim
RUN useradd --system --uid 10001 --user-group --create-home docmill \
 && install -d -o docmill -g docmill /shared
COPY --from=build /opt/docmill /opt/docmill
ENV PATH=/opt/docmill/bin:$PATH PYTHONUNBUFFERED=1 STORAGE_BASE_PATH=/shared
USER docmill
WORKDIR /home/docmill
VOLUME /shared
STOPSIGNAL SIGTERM
# Healthy: this container can reach the database with its own settings and finds procrastinate's schema there.
HEALTHCHECK --interval=30s --timeout=15s --start-period=30s --retries=3 \
  CMD ["procrastinate", "--app=procrastinate_app.app", "healthchecks"]
CMD ["procrastinate", "--app=procrastinate_app.app", "worker"]
