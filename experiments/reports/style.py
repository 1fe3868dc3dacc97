"""The look of the report's page, in variables from which pictures take their colours too."""

from .pictures import DARK, LIGHT

__all__ = ["style"]


def style() -> str:
    """The page's style sheet: colours as variables, for light and dark ground."""
    light = "".join(f"--{name}: {code}; " for name, code in LIGHT.items())
    dark = "".join(f"--{name}: {code}; " for name, code in DARK.items())
    return (
        f":root {{ color-scheme: light dark; {light}}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n" + _RULES
    )


_RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.15; margin: .4rem 0 .6rem; font-weight: 600; }
h1 .big { font-size: clamp(2.6rem, 9vw, 4.2rem); letter-spacing: -.02em; margin-right: .3rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .8rem; padding-top: .8rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .4rem; }
p { margin: .4rem 0 .7rem; max-width: 46rem; }
.kicker { color: var(--muted); font-size: .9rem; }
.lead { font-size: 1.15rem; }
.not { color: var(--hurt); font-weight: 600; }
.strong { font-weight: 600; }
.banner { background: #b3121d; color: #fff; padding: .9rem 1.1rem; border-radius: .4rem;
  margin: .8rem 0; font-size: 1.1rem; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: 1.2rem; }
.card { flex: 1 1 14rem; border: 1px solid var(--grid); border-top: 4px solid var(--muted);
  border-radius: .3rem; padding: .6rem .9rem; }
.card p { margin: .1rem 0; font-size: .88rem; color: var(--muted); }
.card .figure { font-size: 1.7rem; color: var(--ink); font-weight: 600; }
.card.client { border-top-color: var(--client); }
.card.example { border-top-color: var(--example); }
ul { padding-left: 1.2rem; max-width: 46rem; margin: .4rem 0 .8rem; }
li { margin: .25rem 0; }
.beside { display: grid; grid-template-columns: minmax(0, 31rem) minmax(0, 1fr); gap: 1.6rem;
  align-items: start; }
figure { margin: 0; }
svg { width: 100%; height: auto; display: block; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0 1rem; min-width: 60%; }
caption { caption-side: bottom; text-align: left; color: var(--muted); font-size: .82rem;
  padding-top: .35rem; }
th, td { text-align: left; padding: .32rem .9rem .32rem 0; vertical-align: top;
  border-bottom: 1px solid var(--grid); }
th { font-weight: 600; border-bottom-color: var(--muted); }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.yes { color: var(--gain); font-weight: 600; }
td.yes::before { content: "✓ "; }
td.no { color: var(--hurt); }
td.no::before { content: "✗ "; }
code { font-size: .92em; }
@media (max-width: 48rem) { .beside { grid-template-columns: minmax(0, 1fr); gap: .6rem; }
  main { padding: 1rem .9rem 3rem; } }
@media print { body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  figure, tr, .card, .banner { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .beside { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } }
"""
