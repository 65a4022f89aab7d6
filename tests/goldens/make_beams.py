"""Makes `beams.json`: beam search of transformers on `families/llama_gqa_tied`.

Run with the extra `parity`, after make_families.py:  python tests/goldens/make_beams.py

Each case: width, length penalty, ids that end a text, tokens at most, prompt, and the best text with its score.
"""

import json
import pathlib

import torch
import transformers

HERE = pathlib.Path(__file__).parent
PROMPTS = [[5], [17, 40, 9], [99, 3, 3, 64, 21], [70, 71]]
# So many ends that texts end early: a random model gives each token about 1/128.
CASES = [
    {"beams": 2, "length_penalty": 1.0, "eos": [7], "limit": 5},
    {"beams": 4, "length_penalty": 1.0, "eos": list(range(4, 34)), "limit": 8},
    {"beams": 4, "length_penalty": 0.0, "eos": list(range(4, 34)), "limit": 8},
    {"beams": 3, "length_penalty": 2.0, "eos": list(range(60, 70)), "limit": 12},
]

if __name__ == "__main__":
    model = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / "families" / "llama_gqa_tied", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    made = []
    for case in CASES:
        for prompt in PROMPTS:
            found = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                num_beams=case["beams"],
                length_penalty=case["length_penalty"],
                early_stopping=False,
                eos_token_id=case["eos"],
                pad_token_id=0,
                max_new_tokens=case["limit"],
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
            tokens = found.sequences[0, len(prompt) :].tolist()
            made.append({**case, "prompt": prompt, "tokens": tokens, "score": float(found.sequences_scores[0])})
            print(case["beams"], case["length_penalty"], tokens, round(made[-1]["score"], 4))
    (HERE / "beams.json").write_text(json.dumps(made) + "\n")
