"""Files below the storage base path: nothing that a caller names can lead out of it, and nothing half-written is ever seen."""

from jobs.adapters.storage.local import Fingerprint, LocalStorage, StoredUpload
from jobs.adapters.storage.names import safe_display_name, storable_path, storable_text
from jobs.adapters.storage.removal import discard

__all__ = ["Fingerprint", "LocalStorage", "StoredUpload", "discard", "safe_display_name", "storable_path", "storable_text"]
