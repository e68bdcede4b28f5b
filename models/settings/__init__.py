"""All configuration: environment variables without prefix and `.env` in the working directory, typed and checked at start."""

from models.settings.fields import Settings, allowed_values, default_value, secret_files
from models.settings.reading import load_settings

__all__ = ["Settings", "allowed_values", "default_value", "load_settings", "secret_files"]
