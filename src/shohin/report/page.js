(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const wanted = matchMedia("(prefers-color-scheme: dark)");
  const color = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  // figures name colours as "var:accent": the theme decides what that is
  const paint = (value) => {
    if (typeof value === "string") return value.startsWith("var:") ? color(value.slice(4)) : value;
    if (Array.isArray(value)) return value.map(paint);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v)]));
    return value;
  };
  const axis = () => ({ gridcolor: color("grid"), linecolor: color("grid"), zerolinecolor: color("grid"), automargin: true, title: { standoff: 10 } });
  const merge = (a, b) => {
    const out = { ...a };
    for (const [k, v] of Object.entries(b)) out[k] = v && typeof v === "object" && !Array.isArray(v) ? merge(out[k] || {}, v) : v;
    return out;
  };
  const draw = () => {
    for (const [id, figure] of Object.entries(figures)) {
      const base = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 60, r: 16, t: 44, b: 50 }, hovermode: "closest",
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("ink") },
        hoverlabel: { bgcolor: color("surface"), bordercolor: color("grid"), font: { color: color("ink") } },
        xaxis: axis(), yaxis: axis(),
      };
      Plotly.react(document.getElementById(id), paint(figure.data), merge(base, paint(figure.layout)), { responsive: true, displaylogo: false, displayModeBar: false });
    }
  };
  const theme = (name) => { root.dataset.theme = name; draw(); };
  document.getElementById("theme").addEventListener("click", () => theme(root.dataset.theme === "dark" ? "light" : "dark"));
  wanted.addEventListener("change", () => theme(wanted.matches ? "dark" : "light"));
  theme(wanted.matches ? "dark" : "light");
})();
