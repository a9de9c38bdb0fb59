"""What a model family is: its blocks, its linears, its quirks; and the block runner."""
