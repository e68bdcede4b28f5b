"""placeholder while the settings are being written"""
from pydantic_settings import BaseSettings


class Settings(BaseSettings):
    """All configuration."""
