"""One file a layout, and the shard writer they share."""
