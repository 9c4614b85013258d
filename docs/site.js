// Typeset every formula; one that KaTeX cannot read stays as it was written, in red.
for (const formula of document.querySelectorAll(".arithmatex")) {
  const text = formula.textContent.trim()
  katex.render(text.slice(2, -2), formula, {displayMode: text.startsWith("\\["), throwOnError: false})
}
