"""Stored formats, each with its writer and its reader: bit layout, tensors, config, what loaders require."""

from qexport.formats.bitsandbytes.four_bit import FourBitFormat
from qexport.formats.bitsandbytes.llm_int8 import LlmInt8Format
from qexport.formats.compressed_tensors.format import W8A8Format
from qexport.formats.gptq.format import GptqFormat
from qexport.formats.merged import MergedFormat
from qexport.formats.registry import Format, Outputs

__all__ = ["Format", "FourBitFormat", "GptqFormat", "LlmInt8Format", "MergedFormat", "Outputs", "W8A8Format"]
