"""Drive the product's own code with a trace's inputs and collect every recorded quantity beside ours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from comparison import Comparison
from recording import Trace, TraceRandomness, critic_parameters, flat
from torch import Tensor

from tdpo_cli import algorithms
from tdpo_cli.algorithms import kl
from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.machine.memory import Plan
from tdpo_cli.machine.world import World
from tdpo_cli.models import load as load_policy
from tdpo_cli.randomness import shuffle_plan, unshuffled
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.preprocess import normalise, resize_crop
from tdpo_cli.rewards.scoring import score_images
from tdpo_cli.train import losses
from tdpo_cli.train import update as updates
from tdpo_cli.train.rollout import Actor
from tdpo_cli.train.state import make_optimizers


def red_minus_green(images: Tensor, prompts) -> Tensor:
    """The traces' reward: [b,3,H,W] in [0,1] -> [b]"""
    return 10 * (images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2)))


class RedMinusGreen:
    name, needs_prompt = "red-minus-green", False
    score = staticmethod(red_minus_green)


# tolerances: the accuracy that the traces' README expects, times at most ten
FORMULA = 3e-6  # formulas fed with recorded inputs: 3e-7
LATENT = 8e-5  # noise predictions through another diffusers: 8e-6
TEXT = 1e-5  # prompt embeddings: 1e-6
EMBED = 2e-6  # image embeddings of recorded images: 2e-7
LEVEL = 2e-4  # image embeddings of our own images, where some pixels differ by the one level that the README expects
IMAGE = 2.4e-5  # final images: 2.4e-6
LOG_PROB = 1e-5  # 1e-6, at the last step up to 1e-5
CRITIC_STEP = 1e-6  # critic weights after every step: 1e-7
CRITIC_END = 3e-5  # full critic vector: 3e-6
KL = 1e-3  # differences of nearly equal log-probs, in units of the largest
SCORE = 3e-4  # a quotient of activations
GRADIENT = 4e-4  # LoRA gradient, in units of its maximum: 4e-5
KNIFE_EDGE = 2e-6  # a ratio this close to the clip range is clipped or not by rounding alone


class Replay:
    """Everything compared, in `comparisons`; what was only fed in, in `inputs`; what is left, in `unknown`."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.comparisons: list[Comparison] = []
        self.inputs: set[str] = {name for name in trace.tensors if name.startswith("init/")}
        self.knife_edges = 0
        self.preset = trace.preset()
        self.randomness = TraceRandomness(trace)
        self.policy = load_policy(self.preset.model)
        self.policy.set_schedule(self.preset.rollout.steps, self.preset.rollout.eta)
        self.encoder = Backbones().clip(str(trace.folder / "model/clip"))
        self.critic = Critic(self.encoder.embed_dim, self.preset.algorithm.critic_init_std)
        trace.load_initial_weights(self.policy, self.critic)
        self.optimizers = make_optimizers(self.policy, self.critic, self.preset)
        self.algorithm = algorithms.make(self.preset)
        self._initial()
        for epoch in range(len(trace.epochs)):
            self._epoch(epoch)

    @property
    def unknown(self) -> set[str]:
        return set(self.trace.tensors) - self.inputs - {c.name for c in self.comparisons}

    def compare(self, name: str, ours: Tensor, tolerance: float, relative: bool = False) -> None:
        if name in self.trace:
            self.comparisons.append(Comparison(name, ours.detach().clone(), self.trace[name], tolerance, relative))

    def compare_number(self, name: str, ours: float | None, recorded: float | None, tolerance: float, relative: bool = False) -> None:
        if recorded is not None:
            pair = (torch.tensor([float("nan") if x is None else x], dtype=torch.float64) for x in (ours, recorded))
            self.comparisons.append(Comparison(name, *pair, tolerance, relative))

    def tokenize(self, prompts) -> Tensor:
        tokenizer = self.policy.family.pipeline.tokenizer
        return tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids

    # --- parts ----------------------------------------------------------------------------------------------------------
    def _initial(self) -> None:
        self.compare("init/neg_prompt_embed", self.policy.encode([]).parts["embeds"], TEXT)

    def _epoch(self, epoch: int) -> None:
        recorded = self.trace.recorded_trajectory(epoch, self.policy)
        self._rollout(epoch, recorded)
        credit = self._credit(epoch, recorded)
        plan = unshuffled(len(recorded), self.preset.rollout.steps)
        for inner in range(self.preset.update.inner_epochs):
            plan = shuffle_plan(self.randomness, epoch, inner, plan, self.preset.update.shuffle_samples, self.preset.update.shuffle_timesteps)
            self._inner_epoch(epoch, inner, recorded, credit, plan)
        self.algorithm.after_epoch(credit)
        recorded_beta = self.trace.epochs[epoch].get("kl_ctl_after")
        self.compare_number(f"e{epoch}/kl_ctl_after", self.algorithm.returns.controller.beta, _number(recorded_beta), FORMULA)

    def _rollout(self, epoch: int, recorded) -> None:
        e, settings = f"e{epoch}/", self.preset.rollout
        plan = Plan.of(self.trace.config["sample"]["batch_size"])
        actor = Actor(self.policy, self.critic, self.encoder, self.randomness, self.preset, plan)
        ours = actor.rollout(actor.draw(epoch, []), range(len(recorded)))
        self.inputs |= {e + "noise"}
        self.compare(e + "prompt_ids", self.tokenize(recorded.prompts), 0)
        self.compare(e + "prompt_embeds", ours.texts[ours.text_rows].parts["embeds"], TEXT)
        self.compare(e + "timesteps", self.policy.timesteps[ours.steps].expand(len(recorded), -1), 0)
        self.compare(e + "latents", ours.latents, settings.steps * LATENT)  # every step adds its prediction's error
        self.compare(e + "log_probs", ours.log_probs, 10 * LOG_PROB)
        if ours.ref_log_probs is not None:
            self.compare(e + self.trace.ref_log_probs_name, ours.ref_log_probs, 10 * LOG_PROB)
        self.compare(e + "image_embeds", ours.image_embeds, LEVEL)
        self.compare(e + "residuals", ours.values, CRITIC_END)
        self.compare(e + "final_images", ours.images, IMAGE)
        self.compare(e + "rewards", score_images({"r": RedMinusGreen()}, ours.images, recorded.prompts, 4)["r"], IMAGE)
        if tuple(ours.prompt_keys) != tuple(recorded.prompt_keys):
            raise AssertionError(f"decoded prompts differ: {ours.prompt_keys} {recorded.prompt_keys}")
        # the networks on recorded states: no error is carried from step to step
        with torch.no_grad():
            predictions, references, levels = [], [], []
            for k in range(settings.steps):
                inputs = recorded.latents[:, k], torch.full((len(recorded),), k), recorded.texts, recorded.text_rows, settings.guidance_scale
                predictions.append(self.policy.predict(*inputs))
                references += [self.policy.predict(*inputs, reference=True)] if self.preset.needs_reference else []
                levels.append((self.policy.decode(recorded.latents[:, k]) * 255).round())
        self.compare(e + "noise_pred", torch.stack(predictions, dim=1), LATENT)
        for name in ("ref_noise_pred", "noise_pred_ref"):
            self.compare(e + name, torch.stack(references, dim=1) if references else torch.empty(0), LATENT)
        self.compare(e + "images_step_u8", torch.stack(levels, dim=1), 1)
        with torch.no_grad():
            embeds = torch.stack([self.encoder(images.float() / 255) for images in self.trace[e + "images_step_u8"]])
            self.compare(e + "image_embeds", embeds, EMBED)
            self.compare(e + "residuals", self.critic(recorded.image_embeds), FORMULA)
        images = self.trace[e + "images_step_u8"][0].float() / 255
        pixels = normalise(resize_crop(images, self.encoder.image_size), self.encoder.mean, self.encoder.std)
        self.compare(e + "pixel_values_sub", pixels[:, :, 3::24, 5::24], FORMULA)

    def _credit(self, epoch: int, recorded):
        e, rewards = f"e{epoch}/", self.trace[f"e{epoch}/rewards"]
        # the same algorithm from the same state without the last normalisation
        plain = algorithms.make(replace(self.preset, algorithm=replace(self.preset.algorithm, advantage_norm="none")))
        plain.load_state_dict(self.algorithm.state_dict())
        self.compare(e + "temporal_rewards_raw", plain.credit(recorded, rewards).advantages, FORMULA)
        credit = self.algorithm.credit(recorded, rewards)
        self.compare(e + "rewards_normed", credit.normed_rewards, FORMULA)
        self.compare(e + "rewards_scaled", credit.normed_rewards, FORMULA)
        self.compare(e + "rewards_clipped", self.algorithm.returns.clipped(credit.normed_rewards), FORMULA)
        self.compare(e + "returns", credit.returns, FORMULA)
        self.compare(e + "temporal_rewards", credit.advantages, FORMULA)
        if recorded.ref_log_probs is not None:
            shaping = self.algorithm.returns.kl_shaping(recorded.log_probs, recorded.ref_log_probs)
            self.compare(e + "kl_penalty", shaping, KL, relative=True)
            penalty = kl.penalty(self.preset.algorithm.kl_penalty, recorded.log_probs, recorded.ref_log_probs)
            for name in ("kl", "kl_penalty_raw"):
                self.compare(e + name, penalty, KL, relative=True)
            difference = kl.penalty("kl", recorded.log_probs, recorded.ref_log_probs)
            for name in ("log_ratio", "kl_log_ratio", "ref_log_ratio"):
                self.compare(e + name, difference, KL, relative=True)
        self.compare_number(e + "mean_kl", credit.mean_kl, _number(self.trace.epochs[epoch]["mean_kl"]), 1e-4, relative=True)
        self._moments(epoch)
        return credit

    def _moments(self, epoch: int) -> None:
        after, ours = self.trace.epochs[epoch]["moments_after"], self.algorithm.returns.moments.state_dict()
        if after is None:
            return
        if after.get("kind") == "per_prompt":
            if set(after["rewards"]) != set(ours["recent"]):
                raise AssertionError(f"e{epoch}: prompts with moments differ: {sorted(after['rewards'])} {sorted(ours['recent'])}")
            for prompt, rewards in after["rewards"].items():
                name = f"e{epoch}/moments_after/{prompt}"
                self.comparisons.append(Comparison(name, torch.tensor(ours["recent"][prompt]), torch.tensor(rewards), FORMULA))
        else:
            theirs = {key: _number(value) for key, value in after.items() if key != "kind"}
            for key, recorded_name in (("mean", "mean"), ("variance", "var"), ("count", "count")):
                self.compare_number(f"e{epoch}/moments_after/{recorded_name}", ours[key], theirs.get(recorded_name), FORMULA)

    def _inner_epoch(self, epoch: int, inner: int, recorded, credit, plan) -> None:
        p = f"e{epoch}/i{inner}/"
        self.inputs |= {p + "perm", p + "perms", *(f"{p}mb/dropout_mask{layer}" for layer in range(3))}
        self.compare(p + "sample_index", plan.sample_index, 0)
        self.compare(p + "step_index", plan.step_index, 0)
        trained = plan.first_columns(self.preset.trained_steps)
        watcher = Watcher(self, recorded, p)
        plan_of_work = Plan.of(self.trace.config["train"]["batch_size"])
        learner = updates.Learner(self.policy, self.critic, self.optimizers, self.preset, self.randomness, plan_of_work, World())
        steps = learner.inner_epoch(recorded, credit, trained, inner, watcher)
        self._micro_batches(p, steps, watcher)
        self._optimizer(p, watcher)
        self._neurons(epoch, inner, recorded, trained)

    def _micro_batches(self, p: str, steps, watcher) -> None:
        batch = self.trace.config["train"]["batch_size"]
        pairs = lambda part, name: torch.cat([getattr(getattr(step, part), name) for step in steps]).unflatten(0, (-1, batch))
        policy_loss, critic_loss = pairs("policy", "losses").mean(1), pairs("critic", "losses").mean(1)
        self.compare(p + "mb/sample_index", pairs("batch", "sample_index"), 0)
        self.compare(p + "mb/step_index", pairs("batch", "step_index"), 0)
        self.compare(p + "mb/noise_pred", torch.cat(watcher.predictions).unflatten(0, (-1, batch)), LATENT)
        self.compare(p + "mb/log_prob", pairs("policy", "log_probs"), LOG_PROB)
        self.compare(p + "mb/log_ratio", pairs("policy", "log_ratios"), LOG_PROB)
        self.compare(p + "mb/ratio", pairs("policy", "ratios"), LOG_PROB)
        recorded_ratios = self.trace[p + "mb/log_ratio"]
        self.compare(p + "mb/approx_kl", torch.stack([losses.approx_kl(row) for row in recorded_ratios]), FORMULA, relative=True)
        self.compare(p + "mb/residual", pairs("critic", "values"), CRITIC_END)
        self.compare(p + "mb/pg_loss", policy_loss, 10 * LOG_PROB)
        self.compare(p + "mb/cf_loss", critic_loss, CRITIC_END)
        self.compare(p + "mb/loss", losses.total_loss(policy_loss, critic_loss, self.preset.algorithm.critic_coef), 10 * LOG_PROB)
        self.compare(p + "mb/pg_clipfrac", pairs("policy", "clipped").double().mean(1), FORMULA)
        self.compare(p + "mb/cf_clipfrac", pairs("critic", "clipped").double().mean(1), FORMULA)
        self.compare(p + "opt/grad_norm_lora", torch.stack([step.outcome.policy_grad_norm for step in steps]), GRADIENT, relative=True)
        self.compare(p + "opt/grad_norm_critic", torch.stack([step.outcome.critic_grad_norm for step in steps]), CRITIC_END, relative=True)

    def _optimizer(self, p: str, watcher) -> None:
        self.compare(p + "opt/lora_grad_first", watcher.lora_gradients[0], GRADIENT, relative=True)
        self.compare(p + "opt/lora_grad", torch.stack(watcher.lora_gradients), GRADIENT, relative=True)
        self.compare(p + "opt/lora", torch.stack(watcher.lora), 1e-5)
        self.compare(p + "opt/critic_grad_probe", torch.stack(watcher.critic_gradients), CRITIC_END, relative=True)
        self.compare(p + "opt/critic_probe", torch.stack(watcher.probes["critic"]), CRITIC_STEP)
        for name in ("critic_exp_avg", "critic_exp_avg_sq"):
            self.compare(f"{p}opt/{name}_probe", torch.stack(watcher.probes[name]), CRITIC_END, relative=True)
        self.compare(p + "opt/critic_norms", torch.tensor(watcher.critic_norms, dtype=torch.float64), CRITIC_END)
        self.compare(p + "opt/adam_step", torch.tensor(watcher.adam_steps, dtype=torch.float64), 0)
        for moment in ("exp_avg", "exp_avg_sq"):
            state = {name: self.optimizers.policy.state[q][moment] for name, q in self.policy.trainable.items()}
            self.compare(f"{p}lora_{moment}_end", self.trace.flat_lora(state), GRADIENT, relative=True)

    def _neurons(self, epoch: int, inner: int, recorded, trained) -> None:
        p = f"e{epoch}/i{inner}/"
        before = self.critic_vectors()
        for name, vector in before.items():
            self.compare(f"{p}{name}_before_reset", vector, CRITIC_END, relative=name != "critic")
        metrics = self.algorithm.after_inner_epoch(self.critic, self.optimizers.critic, recorded, trained, inner, self.randomness)
        after, census = self.critic_vectors(), self.algorithm.last_census
        rows = self.preset.algorithm.neuron_rows
        self.compare(p + "neuron/embeds", recorded.image_embeds[trained.sample_index[:rows, -1], trained.step_index[:rows, -1]], 0)
        for i, layer in enumerate(("layers.0", "layers.2", "layers.4", "layers.6")):
            self.compare(f"{p}neuron/activation/{layer}", census.activations[i], CRITIC_END)
            self.compare(f"{p}neuron/score/{layer}", census.scores[i], SCORE, relative=True)
            self.compare(f"{p}neuron/dormant_mask/{layer}", census.dormant[i], 0)
        probe = self.trace["init/critic_probe_index"]
        for name, vector in after.items():
            self.compare(f"{p}{name}_after_reset", vector, CRITIC_END, relative=name != "critic")
            self.compare(f"{p}neuron/{name}_probe_after_reset", vector[probe], CRITIC_END, relative=name != "critic")
        self.compare(p + "neuron/weights_changed_bits", _bits(before["critic"] != after["critic"]), 0)
        for moment in ("exp_avg", "exp_avg_sq"):
            self.compare(f"{p}neuron/{moment}_zero_before_bits", _bits(before[f"critic_{moment}"] == 0), 0)
            self.compare(f"{p}neuron/{moment}_zero_bits", _bits(after[f"critic_{moment}"] == 0), 0)
        statistics = self.trace.epochs[epoch]["inner"][inner]
        self.compare_number(p + "total_neurons", census.total, statistics["total_neurons"], 0)
        self.compare_number(p + "dormant_neurons", census.dormant_count, statistics["dormant_neurons"], 0)
        self.compare_number(p + "dormant_percentage", 100 * metrics["dormant_fraction"], statistics["dormant_percentage"], 1e-4)
        extra, share = statistics.get("extra_dormant_neurons"), metrics["dormant_fraction_extra"]
        self.compare_number(p + "extra_dormant_neurons", None if share is None else share * census.total, extra, 1e-3)
        self.compare_number(p + "reset", float(metrics["reset"] > 0), float(statistics["reset"]), 0)

    def critic_vectors(self) -> dict[str, Tensor]:
        parameters = critic_parameters(self.critic)
        state = self.optimizers.critic.state
        return {
            "critic": flat(parameters).clone(),
            "critic_exp_avg": flat([state[q]["exp_avg"] for q in parameters]).clone(),
            "critic_exp_avg_sq": flat([state[q]["exp_avg_sq"] for q in parameters]).clone(),
        }


class Watcher(updates.Observer):
    """Notes predictions, gradients, weights and moments at every optimizer step."""

    def __init__(self, replay: Replay, recorded, prefix: str):
        self.replay, self.recorded, self.prefix = replay, recorded, prefix
        self.predictions, self.lora_gradients, self.critic_gradients, self.lora = [], [], [], []
        self.critic_norms, self.adam_steps = [], []
        self.probes = {"critic": [], "critic_exp_avg": [], "critic_exp_avg_sq": []}

    def before_step(self, step):
        replay, recorded = self.replay, self.recorded
        guidance = replay.preset.rollout.guidance_scale if replay.preset.update.guidance else 1.0
        batch = replay.trace.config["train"]["batch_size"]
        with torch.no_grad():
            for row, (n, k) in enumerate(zip(step.sample_index.split(batch), step.step_index.split(batch), strict=True)):
                self._hold_off_the_edge(step.index * (len(step) // batch) + row, n, k, guidance)
                self.predictions.append(replay.policy.predict(recorded.latents[n, k], k, recorded.texts, recorded.text_rows[n], guidance))

    def _settled(self, ours: Tensor, index: int) -> Tensor:
        """Adam divides by the gradient's own size: where its mean is a thousandth of the largest or less, rounding decides the
        direction of a whole step. Such elements count as equal when they are within two steps."""
        replay, recorded = self.replay, self.replay.trace[self.prefix + "opt/lora"][index]
        state = {name: replay.optimizers.policy.state[q]["exp_avg"] for name, q in replay.policy.trainable.items()}
        mean = replay.trace.flat_lora(state).abs()
        undecided = (mean < 1e-3 * mean.max()) & ((ours - recorded).abs() < 2.2 * replay.preset.update.learning_rate)
        return torch.where(undecided, recorded, ours)

    def _hold_off_the_edge(self, micro_batch: int, n: Tensor, k: Tensor, guidance: float) -> None:
        """Where the recorded ratio lies on the clip range to within rounding, the gradient jumps with the last bit of our
        log-prob. There (and only there) the old log-prob fed in takes up the difference, so that the ratio is the recorded
        one; the log-prob itself is compared as everywhere."""
        recorded_ratio = self.replay.trace[self.prefix + "mb/log_ratio"][micro_batch]
        clip_range = self.replay.preset.update.clip_range
        edge = ((recorded_ratio.exp() - 1).abs() - clip_range).abs() < KNIFE_EDGE
        if edge.any():
            x_t, x_next = self.recorded.latents[n, k], self.recorded.latents[n, k + 1]
            log_prob = self.replay.policy.transition(x_t, k, self.recorded.texts, self.recorded.text_rows[n], guidance).log_prob(x_next)
            self.recorded.log_probs[n[edge], k[edge]] = (log_prob - recorded_ratio)[edge]
            self.replay.knife_edges += int(edge.sum())

    def gradients(self, index):
        trainable = self.replay.policy.trainable
        self.lora_gradients.append(self.replay.trace.flat_lora({name: q.grad for name, q in trainable.items()}).clone())
        gradient = flat([q.grad for q in critic_parameters(self.replay.critic)])
        self.critic_gradients.append(gradient[self.replay.trace["init/critic_probe_index"]].clone())

    def after_step(self, step):
        replay, probe = self.replay, self.replay.trace["init/critic_probe_index"]
        self.lora.append(self._settled(replay.trace.flat_lora(replay.policy.trainable), step.batch.index))
        # the next step starts from the recorded weights: Adam turns a rounding error of a near-zero gradient into a whole step
        replay.trace.load_lora(replay.policy, replay.trace[self.prefix + "opt/lora"][step.batch.index])
        for name, vector in replay.critic_vectors().items():
            self.probes[name].append(vector[probe])
        parameters = critic_parameters(replay.critic)
        self.critic_norms.append([q.detach().double().norm().item() for q in parameters])
        lora_parameter = next(iter(replay.policy.trainable.values()))
        self.adam_steps.append([
            float(replay.optimizers.critic.state[parameters[0]]["step"]), float(replay.optimizers.policy.state[lora_parameter]["step"])
        ])  # fmt: skip


def _bits(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.numpy()))


def _number(value) -> float | None:
    """A recorded scalar, also where it was kept in a one-entry table."""
    if isinstance(value, dict):
        value = next(iter(v for k, v in value.items() if k in ("value", "beta", "kl_ctl", "coef")), None)
    return None if value is None else float(value)
