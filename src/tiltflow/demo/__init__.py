"""The embedded world: drawn scenes with captions, a detector that reads them, and a tiny model of them."""
