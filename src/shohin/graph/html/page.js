(() => {
  const root = document.documentElement, model = document.getElementById("model"), marked = document.getElementById("marked");
  document.querySelector(".tools").hidden = false;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  const modules = [...document.querySelectorAll("details.m")];
  const each = (open) => modules.forEach((m) => { m.open = open; });
  document.getElementById("all").addEventListener("click", () => each(true));
  document.getElementById("none").addEventListener("click", () => each(false));

  // one rule marks every place of some groups and fades the others, however many rows there are
  let kept = "";
  const mark = (groups) => {
    const list = groups.split(" ").filter(Boolean);
    const any = list.map((g) => `[data-g~="${g}"]`).join(",");
    marked.textContent = list.length ? `#model .x:not(:is(${any})), #model .dot:not(:is(${any})), .strip a:not(:is(${any})) { opacity: .22; } #model .x:is(${any}) { box-shadow: 0 0 0 2px hsl(var(--h) var(--cd)); } #model .dot:is(${any}) { transform: scale(1.35); }` : "";
    document.querySelectorAll("#legend li").forEach((li) => li.classList.toggle("on", list.includes(li.dataset.g)));
  };
  const owner = (event) => event.target.closest("[data-g]");
  document.addEventListener("mouseover", (event) => { const found = owner(event); mark(found ? found.dataset.g : kept); });
  document.addEventListener("click", (event) => {
    const found = owner(event);
    if (found && !found.closest("summary, .strip")) { kept = kept === found.dataset.g ? "" : found.dataset.g; mark(kept); }
    else if (!event.target.closest("summary, a, button, input") && kept) { kept = ""; mark(""); }
    const link = event.target.closest('a[href^="#o"]');
    if (link) reveal(document.getElementById(link.getAttribute("href").slice(1)));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("#legend li")) event.target.click();
    if (event.key === "Escape") { kept = ""; mark(""); }
  });

  const reveal = (row) => { for (let m = row && row.closest("details"); m; m = m.parentElement.closest("details")) m.open = true; };
  let before = null;
  document.getElementById("find").addEventListener("input", (event) => {
    const text = event.target.value.trim().toLowerCase();
    if (text && !before) before = modules.map((m) => m.open);
    const hits = (row) => !text || row.textContent.toLowerCase().includes(text) || row.querySelector(".name").title.toLowerCase().includes(text);
    const rows = [...model.querySelectorAll(".op")];
    rows.forEach((row) => row.classList.toggle("hidden", !hits(row)));
    modules.forEach((m, i) => {
      const some = !!m.querySelector(".op:not(.hidden)");
      m.classList.toggle("hidden", !some);
      m.open = text ? some : before ? before[i] : m.open;
    });
    if (!text) before = null;
  });
})();
