"The memory of a training, counted before the start, against the peak of a real process"
import json
import os
import random
import subprocess
import sys

import pytest

RUN = '''
import json, re, sys, torch
from pathlib import Path
from datasets import Dataset
from deepseek_nb.train.lora import LoraConfig
from deepseek_nb.train.runs import Named, training_memory
from deepseek_nb.train.trainer import Trainer, TrainingArguments
name, quantise, rank, rows, length, out = json.loads(sys.argv[1])
lora = LoraConfig(r=rank, target_modules='all-linear') if rank else None
if sys.argv[2] == 'count':
    print(training_memory(name, lora.apply if lora else lambda m: m.requires_grad_(), quantise).peak(rows*length))
else:
    model, tok = Named(name, None if quantise else 'float32', 'cpu', quantise).load()
    ids = torch.randint(0, len(tok), (3*rows, length)).tolist()
    args = TrainingArguments(output_dir=out, max_steps=3, per_device_train_batch_size=rows, disable_tqdm=True)
    Trainer(model, args, Dataset.from_dict(dict(tokens=ids, labels=ids)), lora_config=lora).train()
    print(1024*int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]))
'''
CASES = [('smollm2-135m', q, r) for q, r in ((None, 8), ('nf4', 8), ('int8', 4), (None, 0))] + [('mini', None, 0), ('mini', 'int4', 8)]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.draw(2)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_memory_is_told_before_the_start(case, tmp_path):
    "Within a quarter, for batches whose tokens all count"
    rng = random.Random(os.environ['SEED'] + str(case))
    asked = json.dumps([*case, rng.randint(1, 8), rng.choice([48, 96, 128]), str(tmp_path)])
    told, was = (int(subprocess.run([sys.executable, '-c', RUN, asked, do], check=True, capture_output=True, text=True).stdout)
                 for do in ('count', 'train'))
    assert .75 < told/was < 1.25, (asked, told/2**20, was/2**20)
