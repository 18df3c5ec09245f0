"""The Korean words of the lecture's page, and scripts/lecture/README.ko.md: a walkthrough of the claims in Korean.

The text of the walkthrough is in walkthrough.ko.md, by hand. In it {name.3} is the number with index 3, from 0, in what
experiment `name` measured (results.json); {name} stands for its claim, its outcome and its files. So every number is
the one of the English table.
Tests: tests/test_korean.py.
"""

import collections
import functools
import re
from pathlib import Path

from common import experiment  # noqa: F401 (it also makes support importable)
from common.intervals import TRIAL
from common.text import first_sentence
from support.run_folder import UsageError

TEMPLATE = Path(__file__).with_name("walkthrough.ko.md")
NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
TITLE = "강의의 주장을 하나씩 실험하기"
CLAIM = "강의의 주장."
OBJECTIVES = "네 가지 목적 함수"
GLOSSARY = "용어집"
INTRODUCTION = (
    "언어 모델에서 어시스턴트까지, 강의의 주장 하나하나를 minilm으로 실험합니다. 직접 만든 작은 세계에서 작은 모델로 "
    "실험하므로 가능한 최선의 결과를 알 수 있습니다. 주장은 큰 모델에 관한 것입니다. 그 옆에 여기서 시험한 규칙을 "
    "적었으며, 판정은 이 규칙에 대한 것입니다. 규칙과 측정값은 영어로 적었습니다.")
MEANINGS = {
    "shown": "비교하는 값의 신뢰구간이 모두 규칙이 요구하는 범위 안에 있습니다.",
    "not shown": "신뢰구간 가운데 적어도 하나가 규칙이 요구하는 범위를 완전히 벗어났습니다. 이 실험에서 규칙이 "
                 "성립하지 않았다는 뜻일 뿐, 큰 모델에 대해서는 알려 주는 것이 거의 없습니다.",
    "undecided": "어느 쪽도 아니거나, 모델이 규칙에서 다루는 과제를 배우지 못했습니다."}
OUTCOMES = {"shown": "확인됨", "not shown": "확인되지 않음", "undecided": "판정 보류", "not run": "실행하지 않음",
            TRIAL: "시험 실행"}
STAGES = ("1단계. 사전학습과 문맥 내 학습", "2단계. 지시 미세조정", "3단계. 선호 최적화")

CLAIMS = {
    "pretrain": "언어 모델은 일반 텍스트에서 다음 토큰을 예측하며 학습한다.",
    "in_context": "경사 하강을 한 스텝도 하지 않아도, 프롬프트에 예시를 넣으면 과제의 정확도가 오른다(few-shot).",
    "context_limit": "프롬프트로 배우는 양은 문맥의 길이를 넘지 못한다. 문맥을 벗어난 예시는 아무것도 바꾸지 않는다.",
    "needs_gradient": "어려운 과제에서는 프롬프트만으로 부족하고, 경사 하강이 몇 스텝 필요하다.",
    "encoder_vs_decoder":
        "정답이 달린 아주 많은 데이터로 미세조정한 BERT 방식의 인코더와, 프롬프트에 예시를 몇 개 넣은 GPT 방식의 "
        "디코더는 정확도가 비슷하다.",
    "cot_few_shot":
        "여러 단계를 거쳐야 하는 문제에서, 풀이 과정을 적은 예시(chain of thought)를 주면 답만 적은 예시를 줄 때보다 "
        "정확도가 높다.",
    "cot_zero_shot":
        "예시가 없어도, 질문 뒤에 \"Let's think step by step\"을 붙이면 여러 단계를 거쳐야 하는 문제의 정확도가 "
        "오른다.",
    "instruct":
        "지시 미세조정에서는 사전학습한 모델을 여러 과제의 시연(지시와 답)으로 학습하고, 손실은 답에서만 구한다. "
        "과제마다 따로 두던 모델을 모델 하나가 대신한다.",
    "unseen_tasks": "지시 미세조정은 학습하지 않은 과제에도 일반화하며, 학습하는 과제가 많을수록 좋다.",
    "multiple_choice":
        "지시 미세조정한 모델은 MMLU처럼 여러 과목의 객관식 문제로 평가한다. 이런 시험으로는 주로 사전학습에서 외운 "
        "사실을 잰다.",
    "demo_cost": "시연 데이터는 모으는 데 비용이 많이 든다. 시연은 사람이 글로 써야 하고, 비교는 클릭 한 번이면 된다.",
    "uniform_penalty":
        "손실은 틀린 토큰을 모두 똑같이 벌하고, 글쓰기처럼 답이 열려 있는 과제에는 정답이 하나로 정해져 있지 않다. "
        "그래서 가능도와 사람의 선호는 일치하지 않는다.",
    "sampling": "비교할 응답은 모델에서 온도를 주어 샘플링한다. 온도가 높을수록 응답이 다양해진다.",
    "reward_model":
        "모든 출력을 사람에게 평가받으려면 비용이 너무 많이 든다. 평가를 조금만 모아, 보상을 예측하는 모델을 학습한다.",
    "unlabelled":
        "선호를 직접 모델링하면 레이블이 없는 데이터에도 일반화한다. 비교가 없는 프롬프트도 학습에 쓸 수 있다.",
    "few_labels": "보상 모델에도 DPO에도 선호 데이터는 조금이면 충분하다.",
    "pairwise":
        "사람의 점수에는 잡음이 있고 기준도 저마다 다르다. 두 답 가운데 어느 쪽이 나은지 묻는 편이 더 믿을 "
        "만하다.",
    "rlhf": "대리 보상에서 β × KL을 뺀 값을 최대화하도록 정책을 학습한다. KL은 출발한 모델에서 멀어진 정도이다.",
    "kl_penalty":
        "페널티가 없으면 정책은 출발한 모델에서 멀어져 보상 모델의 빈틈을 이용한다. 보상과 KL 사이의 균형은 β로 "
        "정한다.",
    "rl_is_hard": "강화학습은 제대로 하기 어렵다.",
    "imperfect_preference":
        "사람의 선호 또한 완전하지 않다. 집단과 기준에 따라 다르며, 모두의 비교로 학습한 모델 하나로 모두를 "
        "만족시킬 수는 없다.",
    "dpo": "둘 가운데 하나가 선택된 응답 쌍만으로 정책을 직접 학습한다. 보상 모델도 샘플링도 필요 없다.",
    "rlhf_vs_dpo":
        "RLHF와 DPO의 목표는 같은 정책, 곧 사람의 선호가 따르는 보상에 대한 최적 정책 π*이다. 그래서 같은 비교와 같은 "
        "참조 모델에서 출발하면 같은 KL에서 같은 진짜 보상에 이른다. DPO는 보상 모델과 샘플이 필요 없어서 비용이 적게 "
        "든다.",
}

# Korean, English, symbol, meaning.
TERMS = (
    ("사전학습", "pretraining", "", "많은 텍스트에서 다음 토큰을 예측하며 학습하는 첫 단계"),
    ("문맥 내 학습", "in-context learning", "", "가중치를 바꾸지 않고 프롬프트의 예시만으로 과제를 해내는 것"),
    ("예시", "demonstration, few-shot example", "", "프롬프트에 넣는 (입력, 답) 쌍"),
    ("생각의 사슬", "chain of thought (CoT)", "", "답에 앞서 적는 풀이 과정. '사고의 사슬'이라고도 한다"),
    ("지시 미세조정", "instruction finetuning", "", "여러 과제의 (지시, 답) 쌍으로 하는 지도 미세조정"),
    ("지도 미세조정", "supervised finetuning (SFT)", "", "시연 데이터의 답에 대한 교차 엔트로피를 줄이는 학습"),
    ("시연 데이터", "demonstrations", "", "사람이 쓴 (지시, 답) 쌍"),
    ("프롬프트", "prompt", "x", "모델에 주는 글"),
    ("응답", "response", "y", "모델이 쓰는 글. 끝 토큰 EOS까지 포함한다"),
    ("정책", "policy", "π", "학습하는 모델. 곧 프롬프트가 주어졌을 때 응답의 확률 분포"),
    ("참조 모델", "reference model", "π_ref", "3단계를 시작할 때의 모델을 고정해 둔 것. 여기서는 SFT 모델"),
    ("로그 확률", "log-probability (log-prob)", "log π(y|x)", "Σ_t log π(y_t|x, y_<t). 응답의 모든 토큰에 걸쳐 더한다"),
    ("손실", "loss", "L", "최소화하는 값"),
    ("선호 최적화", "preference optimisation", "", "사람이 더 좋아하는 응답이 나오도록 정책을 학습하는 것"),
    ("쌍별 비교", "pairwise comparison", "(y_w, y_l)", "두 응답과, 사람이 그 가운데 고른 것"),
    ("보상 모델", "reward model", "r(x,y)", "사람의 비교에서 배워 응답의 보상을 예측하는 모델"),
    ("진짜 보상", "gold reward", "", "실험 속 사람들의 실제 선호를 응답마다 수로 나타낸 것. 학습에는 쓰지 않는다"),
    ("대리 보상", "proxy reward", "", "보상 모델이 예측한 보상. RLHF의 학습에 쓴다"),
    ("브래들리-테리 모델", "Bradley-Terry model", "σ(r_w − r_l)", "y_w가 선택될 확률을 보상의 차로 나타낸 모델"),
    ("쿨백-라이블러 발산", "KL divergence", "KL(π ‖ π_ref)",
     "E[log π(y|x) − log π_ref(y|x)], y는 π에서 뽑는다. 정책이 참조 모델에서 얼마나 멀어졌는지를 잰다"),
    ("내트", "nat", "", "자연로그로 잰 정보량의 단위. 1내트는 약 1.44비트"),
    ("KL 페널티", "KL penalty", "β KL(π ‖ π_ref)", "보상에서 빼는 값. β는 KL 1내트를 보상으로 환산한 값"),
    ("정책 경사법", "policy gradient", "−A ∇log π(y|x)",
     "샘플링한 응답의 로그 확률을 어드밴티지에 비례하여 올리거나 내리는 학습 방법"),
    ("베이스라인", "baseline", "b", "기울기의 분산을 줄이려고 보상에서 빼는 값. 그 응답에 의존하지 않아야 한다"),
    ("어드밴티지", "advantage", "A", "r − β log(π/π_ref) − b. 기울기를 구할 때 상수로 본다"),
    ("직접 선호 최적화", "direct preference optimization (DPO)", "", "보상 모델 없이 비교만으로 정책을 학습하는 방법"),
    ("인간 피드백을 이용한 강화학습", "RLHF", "", "비교로 보상 모델을 만들고 그 보상으로 정책을 학습하는 방법"),
    ("최적 정책", "optimal policy", "π*", "J를 최대화하는 정책. 닫힌 형태로 쓸 수 있다"),
    ("보상 해킹", "reward hacking, overoptimisation", "", "대리 보상은 오르는데 진짜 보상은 떨어지는 현상"),
    ("온도", "temperature", "T", "로짓을 나누는 수. 낮추면 분포가 뾰족해진다"),
    ("탐욕 디코딩", "greedy decoding", "T → 0", "매번 확률이 가장 높은 토큰을 고르는 것"),
    ("시드", "seed", "", "난수를 정하는 수. 여기서는 난수를 바꾸어 되풀이한 실험 한 번"),
    ("신뢰구간", "confidence interval", "", "시드를 무한히 많이 썼을 때의 평균이 들어 있을 것으로 보는 범위"),
)


def numbers(measured: str) -> list[str]:
    """The numbers of the sentence that an experiment measured, as they are written there."""
    return re.findall(NUMBER, first_sentence(measured))


@functools.cache
def titles() -> dict[str, str]:
    """The Korean title of every experiment: the heading above {name} in the template."""
    return {name: title for title, name in re.findall(r"^### (.+)\n\n\{(\w+)\}$", TEMPLATE.read_text("utf-8"), re.M)}


def walkthrough(record: dict) -> str:
    """The text of README.ko.md, from the record of the runs (record.py).

    Raises UsageError for a number that an experiment did not measure.
    """
    rows = record["rows"]
    count = collections.Counter(row["outcome"] for row in rows.values())
    words = {"claims": str(len(rows)), "glossary": _glossary(),
             "counts": ", ".join(f"{OUTCOMES[outcome]} {number}개" for outcome, number in count.most_common())}

    def fill(match):
        name, index = match.groups()
        if name in words:
            return words[name]
        if name in rows and index is None:
            return (f"> **{CLAIM}** {CLAIMS[name]}  \n> **판정: {OUTCOMES[rows[name]['outcome']]}** · "
                    f"[{name}.py]({name}.py) · [그림](figures/{name}.png)")
        found = numbers(rows[name]["measured"]) if name in rows else []
        if index is None or int(index) >= len(found):
            raise UsageError(f"{TEMPLATE.name}: {match.group()} is no number that was measured; correct the text there")
        return found[int(index)]
    return re.sub(r"\{(\w+)(?:\.(\d+))?\}", fill, TEMPLATE.read_text("utf-8"))


def _glossary():
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in term) + " |" for term in TERMS)
