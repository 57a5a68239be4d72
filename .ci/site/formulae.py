r"""A formula as words can hold it, where no MathJax is: in alternative texts and in the search. \sqrt{2-2\cos} is √(2-2cos)."""
import re

SIGNS = dict(pair.split() for pair in r"""
alpha α;beta β;gamma γ;delta δ;epsilon ε;varepsilon ε;theta θ;lambda λ;mu μ;pi π;rho ρ;sigma σ;varsigma ς;tau τ;phi φ;varphi φ;psi ψ
Phi Φ;Delta Δ;ell ℓ;top ᵀ;partial ∂;nabla ∇;infty ∞;sum Σ;prod Π;int ∫;sqrt √;times ×;cdot ·;pm ±;otimes ⊗;angle ∠;in ∈;mid |;to →
mapsto ↦;leftarrow ←;approx ≈;sim ~;propto ∝;le ≤;ge ≥;ne ≠;neq ≠;ll ≪;gg ≫;langle ⟨;rangle ⟩;lVert ‖;rVert ‖;Vert ‖;lvert |;rvert |
dots …""".strip().replace("\n", ";").split(";"))
FONTS = r"\\(?:mathrm|mathcal|mathbb|mathbf|mathsf|text|operatorname|hat|bar|tilde|overline)\b\s*"
ARGUMENT = r"\s*(\{[^{}]*\}|\\[A-Za-z]+|[^\s{}\\])"
RAISED = str.maketrans("0123456789+-n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ")


def bare(argument, closed=True):
    "What stands between braces; in round ones if it is more than a sign."
    inside = argument[1:-1].strip() if argument[:1] == "{" else argument
    return f"({inside})" if closed and len(inside) > 1 and not re.fullmatch(r"\\[A-Za-z]+|[\w.]+", inside) else inside


def words(tex):
    "TeX as text."
    tex = tex.replace("\\\\", "; ")
    tex = re.sub(r"\\[()\[\]]|\\(?:begin|end)\{\w+\}|\\(?:[Bb]igg?[lrm]?|left|right)(?![A-Za-z])", "", tex)
    tex = re.sub(r"\\(?:[,;! ]|q?quad\b)|&|~", " ", tex)
    tex = re.sub(r"\\([{}])", lambda m: {"{": "⦃", "}": "⦄"}[m.group(1)], tex)
    was = None
    while tex != was:                                                     # from the innermost braces outwards
        was = tex
        tex = re.sub(FONTS + r"\{([^{}]*)\}", r" \1", tex)
        tex = re.sub(r"\\[td]?frac" + 2 * ARGUMENT, lambda m: f"{bare(m.group(1))}/{bare(m.group(2))}", tex)
        tex = re.sub(r"\\binom" + 2 * ARGUMENT, lambda m: f"C({bare(m.group(1), False)}, {bare(m.group(2), False)})", tex)
        tex = re.sub(r"\\sqrt" + ARGUMENT, lambda m: f"√{bare(m.group(1))}", tex)
        tex = re.sub(r"\^\s*(\{[0-9+n-]+\}|[0-9])", lambda m: bare(m.group(1), False).translate(RAISED), tex)
        tex = re.sub(r"([_^])(\{[^{}]*\})", lambda m: m.group(1) + bare(m.group(2)), tex)
    tex = re.sub(FONTS, " ", tex)
    tex = re.sub(r"\\([A-Za-z]+)", lambda m: SIGNS.get(m.group(1), m.group(1)) + " " * (m.group(1) not in SIGNS), tex)
    tex = re.sub(r"\\(.)", r"\1", re.sub(r"[{}]", "", tex)).replace("⦃", "{").replace("⦄", "}").replace("^ᵀ", "ᵀ")
    return re.sub(r" (?=[),.;])", "", " ".join(tex.split()))
