"""bitsandbytes: 4-bit code books (`four_bit`, its tensors in `four_bit_tensors`) and LLM.int8 (`llm_int8`)."""
