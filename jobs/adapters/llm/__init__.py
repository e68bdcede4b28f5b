"""Extraction by a language model over OpenAI's chat protocol with structured output."""

from jobs.adapters.llm.extract import Extraction, KeptAnswers, ModelExtractor, PartAnswer, make_extractor, with_extraction
from jobs.adapters.llm.schema import Shape, load_shape

__all__ = ["Extraction", "KeptAnswers", "ModelExtractor", "PartAnswer", "Shape", "load_shape", "make_extractor", "with_extraction"]
