// The explorer of a packed row: looks the chosen token's columns up in masks that the library has computed.
for (const root of document.querySelectorAll("[data-explorer]")) {
  const data = JSON.parse(root.dataset.explorer), form = root.querySelector("form");
  const said = root.querySelector(".said"), cells = [...root.querySelectorAll("b[data-c]")];
  const tokens = cells.filter(cell => cell.tabIndex >= -1 && cell.hasAttribute("role"));
  let chosen = tokens[Math.floor(tokens.length / 2)], pinned = false;
  const setting = () => ["packing", "prefix", "window"].map(name => form.elements[name]?.value ?? data.first[name]);
  const owner = cell => data.owners[cell.dataset.c - data.virtual];

  const show = () => {
    const names = setting(), runs = data.runs[names.join("/")][tokens.indexOf(chosen)];
    const mask = new Uint8Array(cells.length);
    for (let i = 0; i < runs.length; i += 2) mask.fill(1, runs[i], runs[i + 1]);
    const count = { virtual: 0, own: 0, other: 0 };
    for (const cell of cells) {
      const seen = mask[cell.dataset.c], virtual = cell.dataset.c < data.virtual;
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
  };

  const choose = cell => {
    chosen.tabIndex = -1;
    chosen = cell;
    chosen.tabIndex = 0;
    show();
  };

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
