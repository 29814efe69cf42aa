"""Eight linear teachers that share structure and conflict: what the plots of notebooks 01 to 05 are trained on.

Teacher t maps x to `U[up[t]] @ V[down[t]] @ x`. Three V's and four U's serve eight teachers, so some read the same
directions of x and write others, and some the reverse. Two U's are the negatives of the other two: a map that serves
both sides cannot exist, so something must tell the teachers apart. What tells them apart is a mark: the last eight
features of x, which no V reads, are noise plus `mark` at the teacher's own place.
"""

import torch

torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
TEACHERS, DOWNS, UPS, RANK, WIDTH = 8, 3, 4, 2, 32


class Teachers:
    "Draws (teacher, input, target) from eight fixed linear maps."

    def __init__(self, seed=0, mark=6.0):
        g = torch.Generator().manual_seed(seed)
        self.V = torch.randn(DOWNS, RANK, WIDTH, generator=g) / WIDTH**0.5
        self.V[..., -TEACHERS:] = 0
        half = torch.randn(UPS // 2, WIDTH, RANK, generator=g)
        self.U = torch.cat([half, -half]) / RANK**0.5
        self.down, self.up, self.mark = torch.arange(TEACHERS) % DOWNS, torch.arange(TEACHERS) % UPS, mark

    def batch(self, size, generator):
        "Teacher (size,), x (size, WIDTH), target (size, WIDTH)."
        t = torch.randint(TEACHERS, (size,), generator=generator)
        x = torch.randn(size, WIDTH, generator=generator)
        x[torch.arange(size), WIDTH - TEACHERS + t] += self.mark
        return t, x, torch.einsum("tor,tri,ti->to", self.U[self.up[t]], self.V[self.down[t]], x)


def train(predict, parameters, teachers, steps=600, size=256, lr=1e-2, seed=0, each_step=None, extra=None):
    "Fit `predict(t, x)` to the targets with Adam; return the error at each step, 1 = predicting nothing."
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    errors = []
    for _ in range(steps):
        t, x, y = teachers.batch(size, g)
        error = (predict(t, x) - y).square().sum() / y.square().sum()
        optimizer.zero_grad()
        (error + (extra() if extra else 0)).backward()
        optimizer.step()
        errors.append(error.item())
        if each_step:
            each_step()
    return errors


def smooth(errors, width=25):
    "Moving average, for curves."
    return torch.tensor(errors).unfold(0, width, 1).mean(-1)
