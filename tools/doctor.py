"""Classic troubles of preference runs, told while they happen: what is seen, and what to try."""

from collections.abc import Callable


class Doctor:
    """Looks at a run's metrics after each step; says each trouble once."""

    def __init__(self, earlier: list[dict[str, float]], total: int, say: Callable) -> None:
        self.history, self.total, self.say = list(earlier), total, say
        self.known: set[str] = set()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.history.append(metrics)
        for name, advice in diagnose(self.history, self.total).items():
            if name not in self.known:
                self.known.add(name)
                self.say(f"diagnosis at step {step}: {advice}")


def diagnose(history: list[dict[str, float]], total: int) -> dict[str, str]:
    """Classic troubles that the metrics so far show: name -> one line of advice."""
    troubles, now, first = {}, history[-1], history[0]
    recent = history[-max(5, total // 20) :]
    if "rewards/margin" in now and len(history) >= 10:
        early = history[len(history) // 2]
        falling = now["rewards/chosen"] < min(-0.1, early["rewards/chosen"])
        if falling and now["rewards/margin"] > early["rewards/margin"] + 0.05:
            troubles["slide"] = (
                "the chosen reward falls while the margin grows: DPO's known slide; "
                "add +sft, or more of bco"
            )
        sure = all(m["rewards/accuracy"] == 1.0 for m in recent)
        if sure and len(history) <= max(10, total // 20):
            troubles["too easy"] = (
                "accuracy is 1.0 within 5 % of the run: chosen and rejected may differ by a "
                "surface mark (length, format); look with tools/look.py show"
            )
        warm = len(history) > max(3, total // 10)
        if warm and all(m["rewards/chosen"] == m["rewards/rejected"] == 0 for m in recent):
            troubles["stuck"] = "all log-ratios are 0 after warm-up: nothing is being trained"
    if len(history) >= 10 and now["nll"] > 1.2 * first["nll"] + 0.05:
        troubles["forgetting"] = (
            "the NLL of chosen responses has risen by more than 20 %: lower lr or add +sft"
        )
    return troubles
