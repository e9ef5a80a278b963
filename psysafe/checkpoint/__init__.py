"""Files of weights: published safetensors in, PEFT's adapters in and out, merged models out."""
