"""One file per PEFT type, and one for MLX-LM. Every file here is a type; `ADAPTERS` in the package above
lists them."""
