"""The procrastinate App of docmill: settings, logging, connector, worker defaults, import paths. No tasks, no SQL."""

from jobs.logs import configure_logging
from jobs.sessions import process_name
from jobs.worker import DocmillApp
from models.settings import load_settings

settings = load_settings()
configure_logging(settings, role="worker", worker=process_name())
app = DocmillApp(settings, import_paths=["jobs.tasks", "jobs.maintenance", "jobs.unpack", "jobs.reembedding"])
