"""pbq binarizes Hugging Face causal LMs after training. Importing it registers the loader."""
