// Marks the stop that is in view in the list of stops; the page can be read without it.
const links = new Map([...document.querySelectorAll("nav a")].map(link => [link.hash.slice(1), link]));
const list = document.querySelector("nav details");
if (matchMedia("(max-width:900px)").matches) list.open = false;
const watcher = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-10% 0px -80% 0px" });
for (const section of document.querySelectorAll("main section")) watcher.observe(section);

// The explorer of a packed row: looks the chosen token's columns up in masks that the library has computed.
for (const root of document.querySelectorAll("[data-explorer]")) {
  const data = JSON.parse(root.dataset.explorer), form = root.querySelector("form");
  const said = root.querySelector(".said"), cells = [...root.querySelectorAll("b[data-c]")];
  const tokens = cells.filter(cell => cell.tabIndex >= -1 && cell.hasAttribute("role"));
  const bytes = Object.fromEntries(Object.entries(data.masks).map(
    ([name, text]) => [name, Uint8Array.from(atob(text), letter => letter.charCodeAt(0))]));
  let chosen = tokens[Math.floor(tokens.length / 2)], pinned = false;
  const setting = () => ["packing", "prefix", "window"].map(name => form.elements[name].value);
  const owner = cell => data.owners[cell.dataset.c - data.virtual];

  function show() {
    const names = setting(), mask = bytes[names.join("/")], query = tokens.indexOf(chosen);
    const count = { virtual: 0, own: 0, other: 0 };
    for (const cell of cells) {
      const at = query * cells.length + Number(cell.dataset.c);
      const seen = (mask[at >> 3] >> (7 - (at & 7))) & 1, virtual = cell.dataset.c < data.virtual;
      const leak = seen && !virtual && owner(cell) !== owner(chosen);
      cell.hidden = virtual && names[1] === "none";
      cell.classList.toggle("seen", seen === 1 && !leak);
      cell.classList.toggle("leak", Boolean(leak));
      cell.classList.toggle("chosen", cell === chosen);
      if (cell.hasAttribute("role")) cell.setAttribute("aria-selected", String(cell === chosen));
      if (seen) count[virtual ? "virtual" : leak ? "other" : "own"] += 1;
    }
    const place = owner(chosen) < 0 ? "padding" : `document ${owner(chosen)}`;
    const parts = [`${count.own} of its own document, itself included`];
    if (names[1] !== "none") parts.unshift(`${count.virtual} virtual tokens`);
    parts.push(count.other ? `and ${count.other} of another document, which is a leak` : "and none of another");
    said.textContent = `"${chosen.textContent}", ${place}, sees ${parts.join(", ")}. `
      + `In the whole row ${data.leaks[names.join("/")]} pairs of tokens leak.`;
    for (const line of root.querySelectorAll("[data-loss]"))
      line.classList.toggle("now", line.dataset.loss === names.slice(0, 2).join("/"));
  }

  function choose(cell) {
    chosen.tabIndex = -1;
    chosen = cell;
    chosen.tabIndex = 0;
    show();
  }

  root.addEventListener("pointerover", event => {
    const cell = event.target.closest("b[role]");
    if (cell && !pinned) choose(cell);
  });
  root.addEventListener("click", event => {
    const cell = event.target.closest("b[role]");
    if (cell) { pinned = !(pinned && cell === chosen); choose(cell); }
  });
  root.addEventListener("focusin", event => { if (event.target.matches("b[role]")) choose(event.target); });
  root.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8 }[event.key];
    if (!step || !event.target.matches("b[role]")) return;
    event.preventDefault();
    tokens[Math.min(tokens.length - 1, Math.max(0, tokens.indexOf(chosen) + step))].focus();
  });
  form.addEventListener("input", show);
  form.hidden = false;
  show();
}
