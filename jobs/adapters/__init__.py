"""The outside world: parsers, embedders, extractors, storage. Speak `models`; know no queue and no database."""
