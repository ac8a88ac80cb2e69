"""SPAM and AdamWSPAM, written from their descriptions, in Python floats and one entry at a time."""

import math
import statistics


class Entry:
    """One entry of a parameter, and what is kept for it."""

    def __init__(self, weight):
        self.weight = weight
        self.m = self.v = self.v_max = 0.0


class Reference:
    """Steps along lists of gradients; a list is a parameter."""

    def __init__(self, weights, lr, betas, eps, decay, *, theta, delay, interval, warmup):
        self.params = [[Entry(w) for w in own] for own in weights]
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
        self.theta, self.delay, self.interval, self.warmup = theta, delay, interval, warmup
        self.taken = 0

    @property
    def weights(self):
        return [[entry.weight for entry in own] for own in self.params]

    def cut(self, gradient, entry, age):
        """The gradient without its spike."""
        if self.theta is None or age < self.delay or entry.v == 0:
            return gradient
        if gradient * gradient > self.theta * entry.v:
            return math.copysign(math.sqrt(self.theta * entry.v), gradient)
        return gradient

    def begin_anew(self):
        """Reset where it is time; return the steps since, and the learning rate."""
        age = self.taken % self.interval
        if age == 0:
            for own in self.params:
                for entry in own:
                    entry.m = entry.v = entry.v_max = 0.0
        if self.taken < self.interval or age >= self.warmup:
            return age, self.lr
        return age, self.lr * 0.5 * (1 - math.cos(math.pi * (age + 1) / (self.warmup + 1)))

    def adam(self, entry, gradient, age, lr, *, amsgrad):
        first, second = self.betas
        entry.weight -= lr * self.decay * entry.weight
        entry.m = first * entry.m + (1 - first) * gradient
        entry.v = second * entry.v + (1 - second) * gradient**2
        entry.v_max = max(entry.v_max, entry.v)
        m = entry.m / (1 - first ** (age + 1))
        v = (entry.v_max if amsgrad else entry.v) / (1 - second ** (age + 1))
        entry.weight -= lr * m / (math.sqrt(v) + self.eps) if m else 0.0

    def spam(self, gradients):
        age, lr = self.begin_anew()
        for own, grads in zip(self.params, gradients, strict=True):
            for entry, gradient in zip(own, grads, strict=True):
                self.adam(entry, self.cut(gradient, entry, age), age, lr, amsgrad=False)
        self.taken += 1


class SpikeReference(Reference):
    """With the norm of all gradients, its history and its clipping."""

    def __init__(self, *args, max_norm, z, window, **options):
        super().__init__(*args, **options)
        self.max_norm, self.z, self.window = max_norm, z, window
        self.norms, self.spikes = [], []

    def adamw_spam(self, gradients):
        age, lr = self.begin_anew()
        cut = [
            [self.cut(g, entry, age) for entry, g in zip(own, grads, strict=True)]
            for own, grads in zip(self.params, gradients, strict=True)
        ]
        norm = math.sqrt(math.fsum(g * g for grads in cut for g in grads))
        known = self.norms[-self.window :]
        spread = statistics.pstdev(known) if len(known) >= 10 else 0.0
        if spread and (norm - statistics.fmean(known)) / spread > self.z:
            self.spikes.append(self.taken)
            for own in self.params:
                for entry in own:
                    entry.m, entry.v = 0.5 * entry.m, 0.9 * entry.v
        self.norms.append(norm)
        share = min(1.0, self.max_norm / (norm + 1e-6))
        for own, grads in zip(self.params, cut, strict=True):
            for entry, gradient in zip(own, grads, strict=True):
                self.adam(entry, gradient * share, age, lr, amsgrad=True)
        self.taken += 1
