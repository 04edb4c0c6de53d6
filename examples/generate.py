"""Generate with a packed checkpoint: plain transformers, and `import pbq`.

python examples/generate.py OUT "The capital of France is"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import pbq  # noqa: F401  teaches transformers the packed layout

if len(sys.argv) < 2:
    sys.exit(__doc__)
path = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"

tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, device_map="auto")
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
