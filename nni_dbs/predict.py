"""Predictors: what a network of the space will score, learnt from the networks that were evaluated.

All have one interface (`Predictor`), so that searches can be compared with the predictor held fixed.
`TransformerPredictor` is that of DBS; `ridge`, `gaussian_process`, `boosting` and `mlp` are baselines.

A fit returns held-out predictions: of every network, what the model says that was trained without it.
`kendall_tau` of these says how far a ranking can be trusted. Ask for it inside of the budget's band too: over
the whole space even a count of FLOPs ranks well.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from sklearn.base import clone
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor, nn

from nni_dbs.cost import Bounds
from nni_dbs.errors import ConfigError, TrainingError
from nni_dbs.space import WidthSpace

FOLDS = 5
FEWEST = 4  # networks that a predictor can be fitted to


class Prediction(NamedTuple):
    """Scores (N,) float64 and how uncertain they are, as a standard deviation (N,), in units of the score."""

    mean: Tensor
    std: Tensor


class Predictor(Protocol):
    """Widths (N, G), in the order of `WidthSpace.encode`, to scores (N,); higher is better.

    Attributes:
        options: How widths are read.
    """

    options: Options

    def fit(self, widths: Tensor, scores: Tensor) -> Tensor:
        """Learns from all that is known and returns held-out predictions (N,) of it."""

    def predict(self, widths: Tensor) -> Prediction:
        """Predicts any networks of the space."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def kendall_tau(predicted: Tensor, measured: Tensor) -> float:
    """Kendall's tau-b of two rankings (N,): 1 for the same order, 0 for none; NaN if one is constant."""
    if len(predicted) < 2:
        return math.nan
    return float(kendalltau(predicted.numpy(), measured.numpy()).statistic)


def check_data(options: Options, widths: Tensor, scores: Tensor) -> None:
    """Raises `TrainingError` unless there is a choice, and enough finite scores, one for each network."""
    if not len(options.columns):
        raise TrainingError("no group of the space has a choice, so there is nothing to predict")
    if len(widths) != len(scores):
        raise TrainingError(f"{len(widths)} networks but {len(scores)} scores")
    if len(scores) < FEWEST:
        raise TrainingError(f"a predictor needs at least {FEWEST} evaluated networks, not {len(scores)}")
    if not torch.isfinite(scores).all():
        raise TrainingError("a score is NaN or infinite; leave networks out that could not be evaluated")


class Options:
    """The widths of a space as points of a simplex: (N, G) <-> (N, L, K).

    Of each of the L groups that have a choice, up to K widths are its options. A width is the pair of
    neighbouring options that it lies between, weighted so that the logarithms of the widths add up; so every
    network of the space is a point, and every point of the simplex a relaxed network.

    Args:
        space: The space.
        limit: Most options of a group: its choices, or so many of them evenly spread.

    Attributes:
        columns: (L,) which groups have a choice.
        widths: (L, K) the options, ascending; the last is repeated where a group has fewer.
        valid: (L, K) which options are there.
        size: (L, 1) full widths.
    """

    def __init__(self, space: WidthSpace, limit: int = 10) -> None:
        chosen = [space.options(name, limit) for name in space.names]
        self.columns = torch.tensor([i for i, c in enumerate(chosen) if len(c) > 1], dtype=torch.long)
        free = [chosen[i] for i in self.columns]
        most = max((len(c) for c in free), default=0)
        padded = [(*c, *[c[-1]] * (most - len(c))) for c in free]
        self.widths = torch.tensor(padded, dtype=torch.float64).reshape(len(free), most)
        self.valid = torch.tensor([[k < len(c) for k in range(most)] for c in free]).reshape(len(free), most)
        self.widest = space.encode(space.largest())  # (G,)
        self.size = space.encode({})[self.columns].unsqueeze(1)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, K)."""
        return len(self.columns), self.widths.shape[1]

    def encode(self, widths: Tensor) -> Tensor:
        """Networks (N, G) as points (N, L, K) float64."""
        groups, options = self.shape
        if not groups:
            return torch.zeros(len(widths), 0, 0, dtype=torch.float64)
        x = widths[:, self.columns].to(torch.float64).clamp(self.widths[:, 0], self.widths[:, -1])  # (N, L)
        below = torch.searchsorted(self.widths, x.T.contiguous(), right=True).T - 1  # (N, L)
        last = self.valid.sum(1) - 1  # (L,)
        below = torch.minimum(below, last - 1)
        rows = torch.arange(groups)
        low, high = self.widths[rows, below], self.widths[rows, below + 1]
        share = (x / low).log() / (high / low).log()  # (N, L)
        p = torch.zeros(len(widths), groups, options, dtype=torch.float64)
        p.scatter_(2, below.unsqueeze(2), (1 - share).unsqueeze(2))
        return p.scatter_(2, below.unsqueeze(2) + 1, share.unsqueeze(2))

    def relaxed(self, p: Tensor) -> Tensor:
        """Expected widths (N, G) of points (N, L, K), differentiable; groups without a choice at theirs."""
        mean = (p.to(torch.float64) * self.widths).sum(2)
        return self.widest.expand(len(p), -1).index_copy(1, self.columns, mean)

    def nearest(self, p: Tensor) -> Tensor:
        """The option of greatest weight of each group: widths (N, G)."""
        best = p.argmax(2)  # (N, L)
        rows = torch.arange(self.shape[0])
        return self.widest.expand(len(p), -1).index_copy(1, self.columns, self.widths[rows, best])

    def one_hot(self, options: Tensor) -> Tensor:
        """Numbers of options (..., L) as points (..., L, K) float64."""
        return F.one_hot(options, self.shape[1]).to(torch.float64)

    def log_ratio(self, p: Tensor) -> Tensor:
        """log(width / full width), (N, L): exact for networks, its mean for relaxed ones."""
        return (p.to(torch.float64) * (self.widths / self.size).log()).sum(2)


class ScikitPredictor:
    """Any regressor of scikit-learn on the logarithms of the widths.

    Args:
        space: The space of the networks.
        regressor: Unfitted. Where its `predict` gives no standard deviation, the root mean square error of
            the held-out predictions takes its place.
        by_posterior: Its `predict` takes `return_std`.
    """

    def __init__(self, space: WidthSpace, regressor: Any, by_posterior: bool = False) -> None:
        self.options = Options(space)
        self.regressor = regressor
        self.by_posterior = by_posterior
        self._fitted: Any = None
        self._data: tuple[Tensor, Tensor] | None = None

    def fit(self, widths: Tensor, scores: Tensor) -> Tensor:
        check_data(self.options, widths, scores)
        self._data = widths, scores
        x, y = self._features(widths), scores.to(torch.float64).numpy()
        self._mean, self._scale = y.mean(), y.std()
        y = (y - self._mean) / (self._scale or 1.0)
        folds = KFold(min(FOLDS, len(y)), shuffle=True, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            held_out = cross_val_predict(clone(self.regressor), x, y, cv=folds)
            self._fitted = clone(self.regressor).fit(x, y)
        self._error = float(np.sqrt(np.mean((held_out - y) ** 2)))
        return torch.from_numpy(held_out * self._scale + self._mean)

    def predict(self, widths: Tensor) -> Prediction:
        if self._fitted is None:
            raise TrainingError("fit the predictor before it predicts")
        x = self._features(widths)
        if self.by_posterior:
            mean, std = self._fitted.predict(x, return_std=True)
        else:
            mean = self._fitted.predict(x)
            std = np.full(len(x), self._error)
        return Prediction(
            torch.from_numpy(mean * self._scale + self._mean), torch.from_numpy(std * self._scale)
        )

    def state_dict(self) -> dict[str, Any]:
        """The data of the last fit: these regressors start from nothing each time."""
        return {} if self._data is None else {"widths": self._data[0], "scores": self._data[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.fit(state["widths"], state["scores"])

    def _features(self, widths: Tensor) -> np.ndarray:
        return self.options.log_ratio(self.options.encode(widths)).numpy()


def ridge(space: WidthSpace) -> ScikitPredictor:
    """Bayesian ridge regression on the logarithms of the widths, their squares and products.

    Quick and simple, in spaces of few groups.
    """
    return ScikitPredictor(
        space,
        make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler(), BayesianRidge()),
        by_posterior=True,
    )


def gaussian_process(space: WidthSpace) -> ScikitPredictor:
    """A Gaussian process: linear and smooth parts and noise, fitted by marginal likelihood.

    For uncertainties that grow away from the data; cubic in the number of networks.
    """
    kernel = (
        ConstantKernel(1.0, (1e-3, 1e3)) * RBF(1.0, (0.1, 100))
        + ConstantKernel(1.0, (1e-4, 1e3)) * DotProduct(1.0, (1e-3, 1e3))
        + WhiteKernel(0.3, (1e-4, 10))
    )
    return ScikitPredictor(space, GaussianProcessRegressor(kernel, random_state=0), by_posterior=True)


def boosting(space: WidthSpace) -> ScikitPredictor:
    """Gradient boosted trees: good with thousands of networks, no gradients, no extrapolation."""
    return ScikitPredictor(
        space, GradientBoostingRegressor(n_estimators=300, learning_rate=0.05, subsample=0.7, random_state=0)
    )


def mlp(space: WidthSpace) -> ScikitPredictor:
    """A plain network of two hidden layers, as in Once-for-All, to compare the Transformer with."""
    return ScikitPredictor(
        space,
        make_pipeline(
            StandardScaler(),
            MLPRegressor(hidden_layer_sizes=(64, 64), alpha=1e-2, max_iter=1000, tol=1e-5, random_state=0),
        ),
    )


class TransformerPredictor:
    """The predictor of DBS: a Transformer over one token for each channel group; an ensemble of seeds.

    Token l of a network is E_group[l] + E_option[l, a_l] + W [r_l, log(1 + c_l)] + b, for ratio r, width c
    and option a. A pre-norm encoder and the mean over the tokens lead to the accuracy head. Widths between
    two options are mixtures of both tokens, so the predictor reads relaxed networks too and has a gradient by
    the widths. Each of the members is trained without one fold of the networks, which it predicts instead;
    all stop at the step where these held-out predictions are best. The members are one batched computation.

    A Gaussian process on the logarithms of the widths goes first (`Trend`), and the Transformer learns what
    it leaves over: nothing, unless that improves the held-out predictions by more than a standard error.

    Given a budget, a budget head learns each cost's share of its limit and a decoder the options, from the
    features of the tokens, on random networks (their labels are free): what the latent variant of the search
    needs. FLOPs, parameters and fitted latencies are known as functions of relaxed widths already, so the
    default variant does without.

    Sources: DBS (poster) for the Transformer predictors of accuracy and budget, frozen in the search; losses,
    sizes, ensemble, decoder and trend are reconstructions, in the line of NAO (Luo et al., 2018: encoder,
    predictor and decoder on one continuous vector).

    Args:
        space: The space of the networks.
        bounds: Budget of the budget head; None leaves that head and the decoder out.
        members: Size of the ensemble, and number of folds.
        dim: Of a token; a multiple of 16. More than 16 pays with hundreds of networks, and for the budget
            head, whose error in the band is 3 to 6 % with 16.
        depth: Layers of the encoder; it has one head for each 16 dimensions.
        steps: Most training steps of the first fit; the others go on from the last weights with a quarter.
        lr: Learning rate.
        trend: Whether the Gaussian process goes first.
        seed: Of initial weights and of batches.

    Attributes:
        options: How widths are read.
        best_step: The step that the last fit stopped at; 0 where the trend is all.
    """

    BATCH = 64
    CHECK = 10  # steps between looks at the held-out predictions
    PATIENCE = 4  # looks without improvement
    FREE_STEPS = 600  # on random networks, before the first fit; a quarter for the heads alone after each
    NOISE = 0.1  # of the features that the decoder reads, in training

    def __init__(
        self,
        space: WidthSpace,
        bounds: Bounds | None = None,
        *,
        members: int = FOLDS,
        dim: int = 16,
        depth: int = 2,
        steps: int = 160,
        lr: float = 2e-3,
        trend: bool = True,
        seed: int = 0,
    ) -> None:
        if members < 2 or dim % 16 or dim < 16:
            raise ConfigError(
                f"members must be at least 2, not {members}, and dim a multiple of 16, not {dim}"
            )
        self.options = Options(space)
        self.bounds = bounds
        self.members = members
        self.steps = steps
        self.lr = lr
        self.generator = torch.Generator().manual_seed(seed)
        limits = 0 if bounds is None else len(bounds.limits)
        self.network = Encoder(self.options, limits, members, dim, depth, self.generator)
        self.trend = Trend() if trend else None
        self.mean, self.scale = 0.0, 1.0
        self.fits = 0
        self.best_step = 0
        self._known: tuple[Tensor, Tensor] | None = None

    def fit(self, widths: Tensor, scores: Tensor) -> Tensor:
        check_data(self.options, widths, scores)
        p, y, x = self._read(widths, scores)
        held_by = torch.arange(len(y)) % self.members  # (N,) never changes, so that no member learns its fold
        out = held_by == torch.arange(self.members).unsqueeze(1)  # (E, N)
        base = torch.zeros(out.shape, dtype=torch.float64)
        if self.trend is not None:
            for member, mask in enumerate(out):
                base[member] = Trend().fit(x[~mask], y[~mask])(x)[0]
        if self.fits == 0 and self.bounds is not None:
            self._train_free(p.float(), list(self.network.parameters()), self.FREE_STEPS)
        self._train(p.float(), y.float(), base.float(), out)
        if self.bounds is not None:  # on the features as they are now
            self._train_free(p.float(), self.network.free_parameters(), self.FREE_STEPS // 4)
        with torch.no_grad():
            members = base + self.network.accuracy(self.network(p.float()))
        self.fits += 1
        return members[held_by, torch.arange(len(y))] * self.scale + self.mean

    @torch.no_grad()
    def predict(self, widths: Tensor) -> Prediction:
        if self._known is None:
            raise TrainingError("fit the predictor before it predicts")
        parts = [self.standardised(self.options.encode(part)) for part in widths.split(4096)]
        mean, std = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return Prediction(mean * self.scale + self.mean, std * self.scale)

    def standardised(self, p: Tensor) -> Prediction:
        """Prediction for points (N, L, K), in standard deviations of the known scores; differentiable."""
        members = self.network.accuracy(self.network(p.float())).to(torch.float64)  # (E, N)
        mean, variance = members.mean(0), members.var(0, unbiased=False)
        if self.trend is not None:
            trend, doubt = self.trend(self.options.log_ratio(p))
            mean, variance = mean + trend, variance + doubt
        return Prediction(mean, (variance + 1e-12).sqrt())

    def state_dict(self) -> dict[str, Any]:
        """All that later fits and predictions depend on: tensors and numbers."""
        return {
            "network": {name: t.clone() for name, t in self.network.state_dict().items()},
            "generator": self.generator.get_state(),
            "known": self._known,
            "fits": self.fits,
            "best_step": self.best_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.generator.set_state(state["generator"])
        self.fits, self.best_step = state["fits"], state["best_step"]
        self._known = state["known"]
        if self._known is not None:
            self._read(*self._known)

    def _read(self, widths: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points (N, L, K), standardised scores (N,) and logarithmic ratios (N, L); fits the trend."""
        self._known = widths, scores
        scores = scores.to(torch.float64)
        self.mean, self.scale = float(scores.mean()), float(scores.std(unbiased=False))
        p = self.options.encode(widths)
        y, x = (scores - self.mean) / (self.scale or 1.0), self.options.log_ratio(p)
        if self.trend is not None:
            self.trend.fit(x, y)
        return p, y, x

    def _train(self, p: Tensor, y: Tensor, base: Tensor, out: Tensor) -> None:
        """Points p (N, L, K), targets y (N,), the trend's part (E, N) of them, held out (E, N)."""
        steps = self.steps if self.fits == 0 else max(self.steps // 4, 1)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=1e-2)
        alone = ((base - y) ** 2)[out]  # squared errors of the trend alone
        best, best_errors, since = _copied(self.network), torch.full_like(alone, torch.inf), 0
        for step in range(steps + 1):
            if step % self.CHECK == 0:
                with torch.no_grad():
                    errors = ((base + self.network.accuracy(self.network(p)) - y) ** 2)[out]
                if errors.mean() < best_errors.mean():
                    best, best_errors, self.best_step, since = _copied(self.network), errors, step, 0
                else:
                    since += 1
            if since == self.PATIENCE or step == steps:
                break
            chosen = torch.randperm(len(y), generator=self.generator)[: self.BATCH]
            scores = base[:, chosen] + self.network.accuracy(self.network(p[chosen]))
            loss = score_loss(scores, y[chosen], (~out[:, chosen]).float()).sum()
            if self.bounds is not None:
                loss = loss + self._free_loss(p[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.network.load_state_dict(best)
        gain = alone - best_errors
        if self.trend is not None and gain.mean() <= gain.std() / len(gain) ** 0.5:
            self.best_step = 0
            for parameter in self.network.head2.values():
                nn.init.zeros_(parameter)

    def _train_free(self, p: Tensor, parameters: list[nn.Parameter], steps: int) -> None:
        """Trains parameters for the budget head and the decoder, on random networks and on p (N, L, K)."""
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, self.lr / 20)
        for _ in range(steps):
            chosen = torch.randperm(len(p), generator=self.generator)[: self.BATCH // 2]
            loss = self._free_loss(p[chosen])
            optimizer.zero_grad()
            loss.backward(inputs=parameters)
            optimizer.step()
            schedule.step()

    def _free_loss(self, p: Tensor) -> Tensor:
        """Error of the budget head on p (B, L, K) and random networks; half the decoder's cross entropy."""
        assert self.bounds is not None
        options = self.random_options(self.BATCH // 2)
        p = torch.cat([self.options.one_hot(options).float(), p])
        h = self.network(p)  # (E, B', L, dim)
        z = budget_excess(self.options.relaxed(p), self.bounds).float()  # (B', I)
        drawn = h[:, : len(options)]
        noisy = drawn + self.NOISE * torch.randn(drawn.shape, generator=self.generator)
        logits = self.network.decode(noisy)  # (E, B, L, K)
        target = options.expand(self.members, -1, -1)
        decoding = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
        squared = ((self.network.budget(h) - z) / (1 + z / 5)) ** 2  # the error relative to the cost
        return (squared.mean((1, 2)) + 0.5 * decoding.reshape(self.members, -1).mean(1)).sum()

    def random_options(self, n: int) -> Tensor:
        """Uniformly drawn options (n, L) of the groups."""
        counts = self.options.valid.sum(1)
        return (torch.rand(n, len(counts), generator=self.generator) * counts).long()


def budget_excess(widths: Tensor, bounds: Bounds) -> Tensor:
    """5 * (cost / limit - 1) of each limit (N, I), for widths (N, G): 0 at the budget; differentiable."""
    return torch.stack([5 * (cost.batch(widths) / most - 1) for _, cost, most in bounds.limits], 1)


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in network.state_dict().items()}


def score_loss(scores: Tensor, y: Tensor, weight: Tensor, margin: float = 0.1, apart: float = 0.1) -> Tensor:
    """Each member's pairwise ranking loss plus half its squared error, (E,).

    Ranking: the mean over pairs with y_i - y_j > apart of max(0, margin - (s_i - s_j)).

    Args:
        scores: (E, N).
        y: (N,) standardised targets.
        weight: (E, N) 1 where the member may see the network, else 0.
        margin, apart: See above.
    """
    squared = (weight * (scores - y) ** 2).sum(1) / weight.sum(1)
    pairs = ((y.unsqueeze(1) - y) > apart) * weight.unsqueeze(2) * weight.unsqueeze(1)  # (E, N, N)
    hinge = F.relu(margin - (scores.unsqueeze(2) - scores.unsqueeze(1)))
    return (hinge * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1) + 0.5 * squared


def posterior(x: Tensor, predicted: Tensor, scores: Tensor) -> Tensor:
    """What evaluated networks are worth, (N,): predictions joined with the measurements.

    What the predictor leaves over is taken for a smooth function of the widths plus noise (a Gaussian
    process, fitted by marginal likelihood). A measurement is believed as far as its neighbours agree: a lucky
    one is not chosen, and where measurements are free of noise, the best one is.

    Args:
        x: (N, L) logarithms of the widths' ratios.
        predicted: (N,) by a predictor that was fitted to these scores.
        scores: (N,) measured.
    """
    left = (scores - predicted).numpy()
    scale = left.std()
    if scale < 1e-12:
        return scores.clone()
    apart = torch.cdist(x, x).fill_diagonal_(torch.inf).amin(1).median().clamp(min=1e-3)
    least = 3 * float(apart)  # a finer function could not be told from noise
    smooth = RBF(3 * least, (least, 100 * least))
    kernel = ConstantKernel(0.5, (1e-4, 1e2)) * smooth + WhiteKernel(0.5, (1e-5, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        process = GaussianProcessRegressor(kernel, random_state=0).fit(x.numpy(), left / scale)
    return predicted + torch.from_numpy(process.predict(x.numpy())) * scale


class Trend:
    """A smooth function of x (N, L), learnt from noisy values: a Gaussian process with an RBF kernel.

    Length of the kernel (of two), height and noise maximise the evidence. Exact, and quick for up to a few
    thousand networks.

    Attributes:
        length: Of the kernel, where all columns have unit variance, over the root of their number.
        ratio: Noise to signal, one of `RATIOS`.
    """

    RATIOS = torch.logspace(-6, 3, 46, dtype=torch.float64)  # noise to signal
    LENGTHS = (1.0, 3.0)

    def fit(self, x: Tensor, y: Tensor) -> Trend:
        """Points x (N, L) float64, targets y (N,); returns itself."""
        self.shift, self.scale = x.mean(0), x.std(0, unbiased=False)
        self.scale[self.scale < 1e-9] = torch.inf  # a constant explains nothing
        self.known, self.level = self._standardised(x), y.mean()
        squared = torch.cdist(self.known, self.known).square()
        least = torch.inf
        for length in self.LENGTHS:
            values, vectors = torch.linalg.eigh(torch.exp(-squared / (2 * length**2)))  # (N,), (N, N)
            values = values.clamp(min=0)
            q = vectors.T @ (y - self.level)
            spread = values / self.RATIOS.unsqueeze(1) + 1  # (R, N)
            noise = (q**2 / spread).mean(1).clamp(min=1e-12)  # (R,)
            surprise, best = (noise.log() + spread.log().mean(1)).min(0)
            if surprise < least:
                least, self.length, self.ratio = surprise, length, float(self.RATIOS[best])
                self.signal = noise[best] / self.ratio
                self.weights = vectors @ (q / (values + self.ratio))  # (N,)
                self.basis = vectors / (values + self.ratio).sqrt()  # (N, N)
        return self

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance (N,) of the noiseless values at x (N, L); differentiable."""
        squared = torch.cdist(self._standardised(x), self.known).square()
        kernel = torch.exp(-squared / (2 * self.length**2))  # (N, known)
        variance = self.signal * (1 - ((kernel @ self.basis) ** 2).sum(1))
        return self.level + kernel @ self.weights, variance.clamp(min=0)

    def _standardised(self, x: Tensor) -> Tensor:
        """Columns of mean 0, and a variance of 1 over the number of those that vary."""
        varying = torch.isfinite(self.scale).sum().clamp(min=1)
        return (x - self.shift) / (self.scale * varying.sqrt())


class Encoder(nn.Module):
    """E pre-norm Transformer encoders with their heads, as one batched computation.

    All parameters have the members as their first dimension; members never mix, so the gradient of the sum of
    their losses trains each as if alone. No dropout: the ensemble and its early stop take its place.
    """

    def __init__(
        self, options: Options, limits: int, members: int, dim: int, depth: int, generator: torch.Generator
    ) -> None:
        super().__init__()

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(members, *shape, generator=generator) * std)

        def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.ParameterDict:
            weight = normal(inputs, outputs, std=gain / inputs**0.5)
            return nn.ParameterDict(
                {"weight": weight, "bias": nn.Parameter(torch.zeros(members, 1, outputs))}
            )

        def norm() -> nn.ParameterDict:
            ones, zeros = torch.ones(members, 1, dim), torch.zeros(members, 1, dim)
            return nn.ParameterDict({"weight": nn.Parameter(ones), "bias": nn.Parameter(zeros)})

        groups, count = options.shape
        self.heads = dim // 16
        features = torch.stack([options.widths / options.size, (1 + options.widths).log()], 2)
        self.features = features.float().reshape(1, -1, 2)  # (1, L * K, 2)
        self.group = normal(groups, 1, dim, std=0.3)
        self.option = normal(groups, count, dim, std=0.1)
        self.feature = linear(2, dim)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": norm(),
                    "qkv": linear(dim, 3 * dim),
                    "project": linear(dim, dim, 0.5),
                    "norm2": norm(),
                    "widen": linear(dim, 2 * dim),
                    "narrow": linear(2 * dim, dim, 0.5),
                }
            )
            for _ in range(depth)
        )
        self.norm = norm()
        self.head1, self.head2 = linear(dim, dim), linear(dim, 1, gain=0.0)  # adds nothing at first
        if limits:
            self.budget1, self.budget2 = linear(dim, dim), linear(dim, limits)
            self.decode1, self.decode2 = linear(dim, dim), linear(dim, count)
            self.valid = options.valid

    def forward(self, p: Tensor) -> Tensor:
        """Points (N, L, K) -> features of the tokens (E, N, L, dim)."""
        tokens = self.group + self.option + _linear(self.feature, self.features).view_as(self.option)
        h = torch.einsum("nlk,elkd->enld", p, tokens)
        members, networks, groups, dim = shape = h.shape
        h = h.reshape(members, -1, dim)
        block: Any
        for block in self.blocks:
            parts = _linear(block["qkv"], _norm(block["norm1"], h))
            parts = parts.reshape(members * networks, groups, 3, self.heads, dim // self.heads)
            q, k, v = parts.permute(2, 0, 3, 1, 4)  # (E * N, heads, L, dim / heads) each
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
            h = h + _linear(block["project"], mixed)
            h = h + _linear(block["narrow"], F.gelu(_linear(block["widen"], _norm(block["norm2"], h))))
        return _norm(self.norm, h).reshape(shape)

    def accuracy(self, h: Tensor) -> Tensor:
        """Features (E, N, L, dim) -> standardised scores (E, N), beside the trend."""
        return _linear(self.head2, F.gelu(_linear(self.head1, h.mean(2)))).squeeze(2)

    def budget(self, h: Tensor) -> Tensor:
        """Features (E, N, L, dim) -> `budget_excess` (E, N, I)."""
        return _linear(self.budget2, F.gelu(_linear(self.budget1, h.mean(2))))

    def free_parameters(self) -> list[nn.Parameter]:
        """Those of the budget head and the decoder alone."""
        heads = (self.budget1, self.budget2, self.decode1, self.decode2)
        return [parameter for head in heads for parameter in head.values()]

    def decode(self, h: Tensor) -> Tensor:
        """Features (E, ..., L, dim) -> logits (E, ..., L, K) of the options, -inf for missing ones."""
        hidden = F.gelu(_linear(self.decode1, h.flatten(1, -2)))
        logits = _linear(self.decode2, hidden).reshape(*h.shape[:-1], -1)
        return logits.masked_fill(~self.valid, -torch.inf)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """(E or 1, M, in) -> (E, M, out)."""
    return torch.baddbmm(layer["bias"], x.expand(len(layer["weight"]), -1, -1), layer["weight"])


def _norm(layer: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * layer["weight"] + layer["bias"]
