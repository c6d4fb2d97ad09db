"""Train the multi-scale tokenizer and the VAR of mars on images, scikit-learn's 1,797 digits (docs/images.md).

    pip install -e '.[eval]'
    python examples/image_tokenizer.py 600  # steps of each of the two trainings

Drawn digits are judged by their nearest neighbours."""

import sys

import torch
from sklearn import datasets, neighbors
from torch.nn.functional import mse_loss

from mars.config import TokenizerConfig, VARConfig
from mars.kernels import linear_cross_entropy
from mars.models.sampling import sample
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
torch.manual_seed(0)
pixels, digit = (torch.from_numpy(array) for array in datasets.load_digits(return_X_y=True))
train, test = (pixels.float().view(-1, 1, 8, 8) / 8 - 1).split((1500, 297))  # in [-1, 1]


def fit(model, loss_of, lr=3e-3, batch=48):
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(torch.randint(len(train), (batch,))).backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)


def tokenizer_loss(picked):
    y, quantized = tokenizer(train[picked])
    return mse_loss(y, train[picked]) + quantized.loss


def var_loss(picked):  # teacher forcing; a tenth of the labels is hidden, for guidance
    label = digit[picked, None].where(torch.rand(len(picked), 1) > 0.1, var.null_condition(len(picked)))
    hidden = var.hidden(tokenizer.quantizer.teacher_inputs(tokens[picked]), label).flatten(0, 1)
    return linear_cross_entropy(hidden, var.head.weight, var.head.bias, tokens[picked].flatten())


size, grids = {"width": 64, "heads": 4, "drop_path": 0.0}, {"patch": (2, 2), "scales": (1, 2, 3, 4)}
config = TokenizerConfig(depth=2, layer_scale=0, codebook_size=128, code_dim=16, **grids, **size)
fit(tokenizer := Tokenizer(config, shape=(1, 8, 8)), tokenizer_loss)
tokens = tokenizer.encode(train)  # (1500, 30), coarse to fine
fit(var := VAR(VARConfig(depth=3, **size), config, classes={"digit": 10}), var_loss)
wanted, how = torch.arange(10).repeat_interleave(20), {"cfg": 1.5, "top_k": 64, "top_p": 0.96, "precision": "float32"}
drawn = tokenizer.decode(sample(var, tokenizer.quantizer, wanted[:, None], torch.rand(200, 30), **how)[0])
judge = neighbors.KNeighborsClassifier(3).fit(train.flatten(1), digit[:1500])
print(f"held-out digits, reconstructed: squared error {mse_loss(tokenizer.decode(tokenizer.encode(test)), test):.4f}")
known, right = judge.score(test.flatten(1), digit[1500:]), judge.score(drawn.flatten(1), wanted)
print(f"told by nearest neighbours: {known:.1%} of the held-out digits, {right:.1%} of the drawn ones:")
for row in drawn[::20, 0].mul(2).add(2).round().int().transpose(0, 1).tolist():
    print("  ".join("".join(" .+#@"[v] for v in each) for each in row))
