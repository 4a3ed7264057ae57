"""Item towers: item inputs in, item embeddings out."""
