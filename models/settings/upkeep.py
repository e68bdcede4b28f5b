"""The settings of what goes on beside the work: alerts, and what is kept for how long."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.settings.checks import WebUrl


class UpkeepSettings(BaseSettings):
    """Part of `Settings`."""

    model_config = SettingsConfigDict(defer_build=True)

    # Alerts
    alert_webhook_url: WebUrl = None
    """Where critical failures, such as new dead letters, are posted as JSON. Unset: they only stand in the table alerts and are notified
    on the channel docmill_alerts."""
    alert_timeout_seconds: Annotated[float, Interval(ge=0.1, le=300)] = 5
    """Seconds that the webhook has to answer."""

    # Retention
    event_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 0
    """Days that the audit trail of a document is kept that has ended and is still there. 0: for ever."""
    deleted_event_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 365
    """Days that the audit trail of a document is kept after its deletion. 0: for ever."""
    job_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 7
    """Days that ended jobs of docmill's tasks are kept in the queue's tables, with their events. 0: for ever."""
    dead_letter_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 90
    """Days that a dead letter is kept after it was requeued, discarded or superseded; open ones always are. 0: for ever."""
    alert_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 90
    """Days that alerts are kept; open ones, and those that a webhook may still be sent, always are. 0: for ever."""
    usage_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 400
    """Days that the ledger of calls to outside services is kept, from which costs are added up; their sums for longer, as long as the
    document or batch is there. 0: for ever."""
    archive_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 30
    """Days that a zip archive, its row and its stored file, is kept after another one was unpacked in its place. Its documents stay. 0: as
    long as the batch."""
    summary_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 30
    """Days that the summary of a run is kept after a later run of its batch has ended, of which there is one each time that something in a
    folder has changed; that of the last run always is. 0: as long as the batch."""
    orphan_file_days: Annotated[int, Interval(ge=0, le=36_500)] = 7
    """Days after which a stored file goes that no document, archive or batch refers to, because its submission was cut off. 0: never."""
