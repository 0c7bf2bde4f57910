"""From files to batches: `records` → `formats` → `tokenize` → `store` → `packing` → `order` → `batches`."""
