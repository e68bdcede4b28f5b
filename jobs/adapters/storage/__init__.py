"""Files below the storage base path: nothing that a caller names can lead out of it, and nothing half-written is ever seen."""

from jobs.adapters.storage.fingerprints import Fingerprint, fingerprint
from jobs.adapters.storage.local import LocalStorage
from jobs.adapters.storage.names import restored_text, safe_display_name, storable_path, storable_text
from jobs.adapters.storage.removal import discard, is_upload
from jobs.adapters.storage.uploads import StoredUpload, Upload

__all__ = [
    "Fingerprint",
    "LocalStorage",
    "StoredUpload",
    "Upload",
    "discard",
    "fingerprint",
    "is_upload",
    "restored_text",
    "safe_display_name",
    "storable_path",
    "storable_text",
]
