"""Everything is decided here: (checkpoint, adapters, settings) → Plan, or a refusal."""
