"""Drive the product's own code with a Flow-GRPO trace's inputs and collect every recorded quantity beside ours.

What the product does not have yet is in `skipped`, by name and with the reason.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from comparison import Comparison
from flow_recording import DYNAMICS, FlowTrace
from torch import Tensor

from tdpo_cli.algorithms.grpo import GRPO, group_advantages
from tdpo_cli.models.samplers.flow import Flow
from tdpo_cli.train.average import Average
from tdpo_cli.train.losses import policy_loss, reference_kl
from tdpo_cli.train.state import make_optimizers
from tdpo_cli.types import Conditioning, Transition

# tolerances, as the traces' README advises
FORMULA = 2e-6  # formulas fed with recorded inputs
LAST_LOG_PROB = 1e-5  # the log-probability of the last step, whose std is a hundred times smaller than the others'
TEXT = 1e-5  # prompt embeddings, in units of their own magnitude where that is above 1
REPLAY = 5e-5  # through the networks
FLOAT64 = 1e-12  # of numbers that both compute in float64
GRADIENT = 4e-4  # of its largest entry: 1.5e-4 was measured in another program
# no recorded ratio is this close to an edge of the clip range, so no decision flips by rounding
EMA_DECAY = 0.9  # of every recording, as its README says; trace.json does not repeat it
NOT_OURS = "an option of the reference that the product does not have"


class FlowReplay:
    """Everything compared, in `comparisons`; what was only fed in, in `inputs`; what is left out for a reason, in `skipped`."""

    def __init__(self, trace: FlowTrace):
        self.trace = trace
        self.comparisons: list[Comparison] = []
        self.inputs: set[str] = {"init/lora"}
        self.knife_edges = 0
        self.policy = trace.policy()
        self.family = self.policy.family
        self.preset = trace.preset()
        self.packed = hasattr(self.family, "pack")
        self.lora = trace["init/lora"]  # as it is at this point of the run
        self.step_functions()
        self.mixed_steps()
        self.texts = self.prompts()
        self.schedule()
        self.base_model()
        self.optimizer_alone()
        self.advantages_alone()
        self.average_alone()
        self.training()

    def compare(self, name: str, ours: Tensor, tolerance: float, **options: bool) -> None:
        if name in self.trace:
            self.comparisons.append(Comparison(name, ours.detach().clone(), self.trace[name], tolerance, **options))

    @property
    def skipped(self) -> dict[str, str]:
        """What the trace holds and the product does not have: name -> reason."""
        reasons = {}
        for name in set(self.trace.tensors) - self.inputs - {c.name for c in self.comparisons}:
            first, last = name.split("/")[0], name.split("/")[-1]
            if first == "same_latent" or first == "D" and last in ("rwr", "sft", "dpo"):
                reasons[name] = NOT_OURS
        return reasons

    @property
    def unknown(self) -> set[str]:
        return set(self.trace.tensors) - self.inputs - {c.name for c in self.comparisons} - set(self.skipped)

    # --- latents: the product's are never packed ------------------------------------------------------------------------
    def unpack(self, latents: Tensor) -> Tensor:
        """As recorded [*, tokens, channels] -> [*, C, h, w]"""
        if not self.packed:
            return latents
        flat = latents.reshape(-1, *latents.shape[-2:])
        return self.family.unpack(flat, *self.policy.latent_shape[-2:]).reshape(*latents.shape[:-2], *self.policy.latent_shape)

    def pack(self, latents: Tensor) -> Tensor:
        if not self.packed:
            return latents
        flat = self.family.pack(latents.reshape(-1, *latents.shape[-3:]))
        return flat.reshape(*latents.shape[:-3], *flat.shape[-2:])

    # --- A: the step alone ----------------------------------------------------------------------------------------------
    def step_functions(self) -> None:
        meta, trace = self.trace.meta["A"], self.trace
        steps = meta["steps"]
        self.inputs |= {f"A/{name}" for name in ("sample", "model_output", "noise", "prev_sample_given")}
        x, velocity, noise, given = (trace[f"A/{name}"] for name in ("sample", "model_output", "noise", "prev_sample_given"))
        euler = self.family.sampler(steps, [0.0] * steps)
        self.compare("A/sigmas", _sigmas(euler), 0)
        self.compare("A/timesteps", euler.timesteps, 0)
        self.compare("A/ode/prev_sample", torch.stack([_at(euler, k, velocity[k], x[k]).sample(noise[k]) for k in range(steps)]), FORMULA)
        if "mu" in meta:
            self.comparisons.append(Comparison("A/mu", torch.tensor([self.family.mu(steps)]), torch.tensor([meta["mu"]]), 1e-7))
        for kind in meta["sde_types"]:
            for level in meta["noise_levels"]:
                name = f"A/{kind}_{level}/"
                sampler = self.family.sampler(steps, [level] * steps, DYNAMICS[kind])
                transitions = [_at(sampler, k, velocity[k], x[k]) for k in range(steps)]
                self.compare(name + "std_dev_t", sampler.diffusion, FORMULA)
                self.compare(name + "sqrt_dt", (sampler.sigma - sampler.sigma_next).sqrt(), FORMULA)
                self.compare(name + "prev_sample_mean", torch.stack([t.mean for t in transitions]), FORMULA)
                moved = [t.sample(noise[k]) for k, t in enumerate(transitions)]
                self.compare(name + "prev_sample", torch.stack(moved), FORMULA)
                drawn = [recorded_log_prob(kind, t, trace[name + "prev_sample"][k]) for k, t in enumerate(transitions)]
                self.compare(name + "log_prob", torch.stack(drawn), LAST_LOG_PROB)
                self.compare(name + "log_prob", torch.stack([*drawn[:-1], trace[name + "log_prob"][-1]]), FORMULA)
                scored = torch.stack([recorded_log_prob(kind, t, given[k]) for k, t in enumerate(transitions)])
                self.compare(name + "log_prob_given", scored, FORMULA, elementwise=True)

    def mixed_steps(self) -> None:
        meta, trace = self.trace.meta["A"], self.trace
        sampler = self.family.sampler(meta["steps"], [meta["noise_levels"][0]] * meta["steps"])
        transition = sampler.step(trace["A/model_output"][0], trace["A/sample"][0], torch.tensor(meta["mixed_steps"]))
        self.compare("A/mixed/prev_sample_mean", transition.mean, FORMULA)
        self.compare("A/mixed/log_prob", transition.log_prob(trace["A/prev_sample_given"][0]), FORMULA, elementwise=True)

    # --- B: prompts, schedule, rollouts -----------------------------------------------------------------------------------
    def prompts(self) -> Conditioning:
        texts = self.policy.encode(self.trace.meta["B"]["prompts"])
        for name, part in (("prompt_embeds", "embeds"), ("pooled_prompt_embeds", "pooled")):
            self.compare(f"B/{name}", texts.parts[part][:-1], TEXT, elementwise=True)
            self.compare(f"B/negative_{name}", texts.parts[part][-1:], TEXT, elementwise=True)
        return texts

    def schedule(self) -> None:
        trace = self.trace
        self.policy.set_schedule(trace.steps, [trace.noise] * trace.steps, trace.dynamics)
        self.sampler = self.policy.sampler
        self.compare("B/sigmas", _sigmas(self.sampler), 0)
        self.compare("B/timesteps", self.policy.timesteps, 0)
        self.compare("B/std_dev_t", self.sampler.diffusion, FORMULA)
        given = {}

        def note(module, arguments, keywords):
            given.update(keywords)

        hook = self.family.network.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            rows = torch.zeros(1, dtype=torch.int64)
            self.policy.predict(torch.zeros(1, *self.policy.latent_shape), rows, self.texts, rows, trace.guidance)
        hook.remove()
        for recorded, name in (("B/image_ids", "img_ids"), ("B/text_ids", "txt_ids")):
            if recorded in trace:
                self.compare(recorded, given[name], 0)

    @torch.no_grad()
    def rollouts(self, epoch: int) -> None:
        """Every sample from its first noise; and every step alone from the recorded state, so that no error is carried on."""
        p, trace = f"e{epoch}/B/", self.trace
        self.inputs |= {p + "prompt_index", p + "noise"}
        rows, recorded = trace[p + "prompt_index"], self.unpack(trace[p + "latents"])
        ours = [self.chain(part, recorded[part, 0], self.unpack(trace[p + "noise"])[part], rows) for part in self.batches(len(rows))]
        latents, velocities, log_probs, images = (torch.cat(column) for column in zip(*ours, strict=True))
        self.compare(p + "latents", self.pack(latents), REPLAY)
        self.compare(p + "model_output", self.pack(velocities), REPLAY)
        self.compare(p + "log_probs", log_probs, REPLAY)
        self.compare(p + "images", images, REPLAY)
        scored = torch.stack(
            [
                _at(self.sampler, k, self.unpack(trace[p + "model_output"])[:, k], recorded[:, k]).log_prob(recorded[:, k + 1])
                for k in range(trace.steps)
            ],
            dim=1,
        )
        self.compare(p + "log_probs", scored, LAST_LOG_PROB)
        self.compare(p + "log_probs", torch.cat([scored[:, :-1], trace[p + "log_probs"][:, -1:]], dim=1), FORMULA)

    def batches(self, count: int) -> list[slice]:
        size = self.trace.config["sample"]["train_batch_size"]
        return [slice(start, start + size) for start in range(0, count, size)]

    def chain(self, part: slice, x: Tensor, noise: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        latents, velocities, log_probs = [x], [], []
        for k in range(self.trace.steps):
            step = torch.full((len(x),), k)
            velocities.append(self.policy.predict(x, step, self.texts, rows[part], self.trace.guidance))
            transition = self.policy.transition(x, step, self.texts, rows[part], self.trace.guidance)
            x = transition.sample(noise[:, k])
            log_probs.append(transition.log_prob(x))
            latents.append(x)
        return torch.stack(latents, 1), torch.stack(velocities, 1), torch.stack(log_probs, 1), self.policy.decode(x)

    # --- ode, fast: the base model ----------------------------------------------------------------------------------------
    @torch.no_grad()
    def base_model(self) -> None:
        trace, meta = self.trace, self.trace.meta["B"]["fast"]
        self.inputs |= {"ode/initial", "fast/noise"}
        initial = self.unpack(trace["ode/initial"])
        sampler = self.family.sampler(trace.steps, [0.0] * trace.steps)
        latents, _, _ = self.without_lora(sampler, initial, torch.zeros(len(initial), trace.steps, *initial.shape[1:]), trace.guidance)
        self.compare("ode/latents", self.pack(latents), REPLAY)
        self.compare("ode/images", self.policy.decode(latents[:, -1]), REPLAY)

        first, size = meta["window_start"], meta["window"]
        sampler = self.family.sampler(meta["steps"], meta["noise_levels"], DYNAMICS[meta["sde_type"]], (first, size))
        self.compare("fast/sigmas", _sigmas(sampler), 0)
        self.compare("fast/timesteps", sampler.timesteps, 0)
        latents, velocities, transitions = self.without_lora(sampler, initial, self.unpack(trace["fast/noise"]), meta["guidance"])
        inside = range(first, first + size)
        self.compare("fast/model_output", self.pack(velocities), REPLAY)
        self.compare("fast/window_latents", self.pack(latents[:, first : first + size + 1]), REPLAY)
        scored = [recorded_log_prob(meta["sde_type"], transitions[k], latents[:, k + 1]) for k in inside]
        self.compare("fast/log_probs", torch.stack(scored, dim=1), REPLAY)
        self.compare("fast/images", self.policy.decode(latents[:, -1]), REPLAY)
        # the formula alone, from recorded states and velocities
        window, velocity = self.unpack(trace["fast/window_latents"]), self.unpack(trace["fast/model_output"])
        alone = [recorded_log_prob(meta["sde_type"], _at(sampler, k, velocity[:, k], window[:, j]), window[:, j + 1]) for j, k in enumerate(inside)]
        tolerance = LAST_LOG_PROB if first + size == meta["steps"] else FORMULA
        self.compare("fast/log_probs", torch.stack(alone, dim=1), tolerance, elementwise=True)

    def without_lora(self, sampler: Flow, x: Tensor, noise: Tensor, guidance: float) -> tuple[Tensor, Tensor, list[Transition]]:
        rows, latents, velocities, transitions = torch.arange(len(x)), [x], [], []
        self.policy.sampler = sampler
        for k in range(len(sampler)):
            velocities.append(self.policy.predict(x, torch.full_like(rows, k), self.texts, rows, guidance, reference=True))
            transitions.append(_at(sampler, k, velocities[-1], x))
            x = transitions[-1].sample(noise[:, k])
            latents.append(x)
        self.policy.sampler = self.sampler
        return torch.stack(latents, 1), torch.stack(velocities, 1), transitions

    # --- E: losses, gradients, optimizer ------------------------------------------------------------------------------------
    def optimizer_alone(self) -> None:
        """The product's optimizer fed with the recorded gradients."""
        trace, policy = self.trace, self.policy
        optimizer = make_optimizers(policy, None, self.preset).policy
        for s in range(trace.updates):
            trace.load_gradient(policy, trace[f"u{s}/grad"])
            norm = torch.nn.utils.clip_grad_norm_(list(policy.trainable.values()), self.preset.update.max_grad_norm)
            self.compare(f"u{s}/grad_norm", norm, FORMULA, relative=True)
            optimizer.step()
            self.compare(f"u{s}/lora", trace.flat(policy.trainable), FORMULA)
        self.moments(optimizer, FORMULA)
        optimizer.zero_grad(set_to_none=True)
        trace.load_lora(policy, self.lora)

    def moments(self, optimizer: torch.optim.Optimizer, tolerance: float) -> None:
        for moment in ("exp_avg", "exp_avg_sq"):
            state = {name: optimizer.state[parameter][moment] for name, parameter in self.policy.trainable.items()}
            self.compare(f"final/{moment}", self.trace.flat(state), tolerance, relative=True)

    # --- D: advantages, the moving average alone ----------------------------------------------------------------------------
    def advantages_alone(self) -> None:
        """Column by column, as the reference does with several rewards."""
        trace, names = self.trace, ("rewards", "prompt_index", "rewards_1d", "prompt_index_1d")
        self.inputs |= {f"D/{name}" for name in names} & set(trace.tensors)
        for name, std in (("grpo_prompt_std", "group"), ("grpo_global_std", "epoch")):
            if f"D/{name}" in trace:
                keys = [str(i) for i in trace["D/prompt_index"].tolist()]
                self.compare(f"D/{name}", torch.stack([group_advantages(keys, r, std) for r in trace["D/rewards"].unbind(1)], 1), FLOAT64)

    def average_alone(self) -> None:
        if "D/ema_weights" not in self.trace:
            return
        self.inputs.add("D/ema_weights")
        given = self.trace["D/ema_weights"]
        weight = given[0].clone()
        average = Average([weight], EMA_DECAY, self.trace.meta["D"]["ema_interval"])
        ours = [average.values[0].clone()]
        for changed in given[1:]:
            weight.copy_(changed)
            average.update()
            ours.append(average.values[0].clone())
        self.compare("D/ema_shadow", torch.stack(ours), FORMULA)

    def credit(self, epoch: int) -> None:
        """Advantages of the epoch's recorded rewards, before and after clipping: [N], [N,J] in `self.advantages`."""
        trace, p = self.trace, f"e{epoch}/D/"
        self.inputs.add(p + "rewards")
        prompts = trace.meta["E"]["epochs"][epoch]["prompts"]
        # the reference has no groups of one image: there all samples are one
        keys = [self.policy.normal_form(prompt) for prompt in prompts] if trace.grouped else [""] * len(prompts)
        samples = SimpleNamespace(prompt_keys=keys, log_probs=torch.zeros(len(keys), trace.trained), ref_log_probs=None)
        credit = GRPO(self.preset).credit(samples, trace[p + "rewards"])
        self.compare(p + "advantages", credit.returns[:, 0], FLOAT64 if trace.grouped else FORMULA)
        self.advantages = credit.advantages

    def training(self) -> None:
        """The whole run. After every optimizer step the recorded weights take the place of ours."""
        trace = self.trace
        self.optimizer = make_optimizers(self.policy, None, self.preset).policy
        self.backwards = self.update = 0
        if "final/ema" in trace:
            self.average = Average(list(self.policy.trainable.values()), EMA_DECAY, trace.meta["D"]["ema_interval"])
            self.average_steps = iter(trace.meta["E"]["ema_step_arguments"])
        for epoch, inner in trace.inner_epochs():
            if inner == 0:
                self.rollouts(epoch)
                self.credit(epoch)
                self.inputs.add(f"e{epoch}/E/mask")
            self.inner_epoch(epoch, inner)
        self.moments(self.optimizer, GRADIENT)
        if "final/ema" in trace:
            self.compare("final/ema", self.averaged(), REPLAY)

    def inner_epoch(self, epoch: int, inner: int) -> None:
        p, trace = f"e{epoch}/i{inner}/E/", self.trace
        self.inputs |= {p + "perm", p + "sample_index"}
        micro_batches = trace[p + "sample_index"].reshape(len(trace[p + "log_prob"]), -1)
        noted: dict[str, list[Tensor]] = {}
        for i, samples in enumerate(micro_batches):
            for j in range(trace.trained):
                for name, value in self.pairs(epoch, samples, j, trace[p + "advantages"][i, j]).items():
                    noted.setdefault(name, []).append(value)
            if "final/ema" in trace:
                # after every micro-batch, several of which may meet the same optimizer step: the reference applies it each time
                self.average.apply(next(self.average_steps))
        self.compare(p + "advantages", self.advantages[micro_batches].transpose(1, 2), FLOAT64 if trace.grouped else FORMULA)
        shape = (len(micro_batches), trace.trained)
        columns = {name: torch.stack(values).unflatten(0, shape) for name, values in noted.items()}
        for name in ("model_output", "mean_shift", "log_prob", "ratio", "policy_loss", "kl_loss", "loss"):
            if name in columns:
                self.compare(p + name, columns[name], REPLAY)
        # the formulas alone, from recorded log-probabilities and means
        old = trace[f"e{epoch}/B/log_probs"][micro_batches][:, :, : trace.trained].transpose(1, 2)
        ratio = (trace[p + "log_prob"] - old).exp()
        losses, _ = policy_loss(ratio, trace[p + "advantages"], trace.clip_range)
        self.compare(p + "ratio", ratio, FORMULA)
        self.compare(p + "policy_loss", losses.mean(-1), FORMULA)
        if p + "mean_shift" in trace:
            shift = trace[p + "mean_shift"]
            flat = shift.flatten(0, 2)
            diffusion = self.sampler.diffusion[: trace.trained].view(1, -1, 1).expand(shift.shape[:3]).reshape(-1)
            kl = reference_kl("flow-grpo", *(Transition(mean, diffusion, mean) for mean in (flat, torch.zeros_like(flat))), diffusion)
            self.compare(p + "kl_loss", kl.view(shift.shape[:3]).mean(-1), FORMULA)

    def pairs(self, epoch: int, samples: Tensor, j: int, advantages: Tensor) -> dict[str, Tensor]:
        """Loss and gradient of one micro-batch at one step; an optimizer step when enough have been accumulated."""
        trace, policy, k = self.trace, self.policy, torch.full((len(samples),), j)
        latents = self.unpack(trace[f"e{epoch}/B/latents"][samples])
        inputs = latents[:, j], k, self.texts, trace[f"e{epoch}/B/prompt_index"][samples], trace.guidance
        velocity = policy.predict(*inputs)
        transition = policy.sampler.step(velocity, latents[:, j], k)
        log_prob = transition.log_prob(latents[:, j + 1])
        ratio = (log_prob - trace[f"e{epoch}/B/log_probs"][samples, j]).exp()
        losses, _ = policy_loss(ratio, advantages, trace.clip_range)
        noted = {"model_output": self.pack(velocity), "log_prob": log_prob, "ratio": ratio, "policy_loss": losses.mean()}
        loss = losses.mean()
        if trace.beta > 0:
            with torch.no_grad():
                reference = policy.transition(*inputs, reference=True)
            kl = reference_kl("flow-grpo", transition, reference, policy.sampler.diffusion[k]).mean()
            noted |= {"mean_shift": self.pack(transition.mean - reference.mean), "kl_loss": kl}
            loss = loss + trace.beta * kl
        noted["loss"] = loss
        (loss / trace.config["accelerate_gradient_accumulation_steps"]).backward()
        self.backwards += 1
        if self.backwards % trace.config["accelerate_gradient_accumulation_steps"] == 0:
            self.optimizer_step()
        return {name: value.detach() for name, value in noted.items()}

    def averaged(self) -> Tensor:
        with self.average.in_place():
            return self.trace.flat(self.policy.trainable)

    def optimizer_step(self) -> None:
        u, trace, trainable = f"u{self.update}/", self.trace, self.policy.trainable
        self.compare(u + "grad", trace.flat({name: parameter.grad for name, parameter in trainable.items()}), GRADIENT, relative=True)
        norm = torch.nn.utils.clip_grad_norm_(list(trainable.values()), self.preset.update.max_grad_norm)
        self.compare(u + "grad_norm", norm, GRADIENT, relative=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lora = trace[u + "lora"]
        self.compare(u + "lora", self.settled(trace.flat(trainable)), REPLAY)
        trace.load_lora(self.policy, self.lora)
        self.update += 1

    def settled(self, ours: Tensor) -> Tensor:
        """Adam divides by the gradient's own size: where its mean is a thousandth of the largest or less, rounding decides much of a
        step. Such elements count as equal within two steps; `optimizer_alone` compares them too, and closely."""
        state = {name: self.optimizer.state[parameter]["exp_avg"] for name, parameter in self.policy.trainable.items()}
        mean = self.trace.flat(state).abs()
        undecided = (mean < 1e-3 * mean.max()) & ((ours - self.lora).abs() < 2.2 * self.preset.update.learning_rate)
        return torch.where(undecided, self.lora, ours)


def recorded_log_prob(kind: str, transition: Transition, x: Tensor) -> Tensor:
    """The product's log-density in the reference's convention: for cps without the constants and without 1 / (2 std^2). -> [b]"""
    if kind != "cps":
        return transition.log_prob(x)
    std = transition.std.flatten()[0]
    if std > 0:
        return 2 * std**2 * (transition.log_prob(x) + torch.log(std) + math.log(2 * math.pi) / 2)
    if not torch.allclose(transition.mean, transition.x0, rtol=0, atol=FORMULA):
        raise AssertionError("a cps step without noise must end at the clean image")
    return -((x - transition.mean) ** 2).flatten(1).mean(1)


def _at(sampler: Flow, k: int, velocity: Tensor, x: Tensor) -> Transition:
    return sampler.step(velocity, x, torch.full((len(x),), k))


def _sigmas(sampler: Flow) -> Tensor:
    return torch.cat([sampler.sigma, sampler.sigma_next[-1:]])
