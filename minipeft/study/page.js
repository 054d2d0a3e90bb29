// Sorts the tables, and filters the answers; the page can be read without it.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    if (!place) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach(one => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => parseFloat(row.cells[place]?.dataset.v ?? "NaN");
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter(row => row.cells.length > 1);
        const order = (a, b) => isNaN(a) ? 1 : isNaN(b) ? -1 : down ? b - a : a - b;
        rows.sort((a, b) => order(value(a), value(b))).forEach(row => body.append(row));
      }
    });
  });
}

const form = document.getElementById("filter"), shown = document.getElementById("shown");
const all = [...document.querySelectorAll("details[data-marks]")];
const page = 25;
let most = page;

function show() {
  const words = form.words.value.toLowerCase(), mark = form.mark.value, cell = form.cell.value;
  let fitting = 0;
  for (const one of all) {
    const marks = one.dataset.marks.split(" ");
    const fits = (!mark || marks.some(m => cell === "" ? m.endsWith(":" + mark) : m === cell + ":" + mark))
      && one.textContent.toLowerCase().includes(words);
    fitting += fits;
    one.hidden = !fits || fitting > most;
  }
  shown.textContent = `${Math.min(fitting, most)} of ${fitting} that fit, of ${all.length} questions`;
  form.more.hidden = fitting <= most;
}

if (form) {
  form.hidden = false;
  form.addEventListener("input", () => { most = page; show(); });
  form.addEventListener("submit", event => event.preventDefault());
  form.more.addEventListener("click", () => { most = Infinity; show(); });
  form.fold.addEventListener("click", () => {
    const open = all.filter(one => !one.hidden), to = open.some(one => !one.open);
    open.forEach(one => { one.open = to; });
  });
  document.addEventListener("keydown", event => {
    const here = event.target.closest?.("details[data-marks] > summary");
    if (!here || event.altKey || event.ctrlKey || event.metaKey) return;
    const seen = all.filter(one => !one.hidden), at = seen.indexOf(here.parentElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: seen.length - 1 }[event.key];
    if (to === undefined || !seen[to]) return;
    event.preventDefault();
    seen[to].firstElementChild.focus();
  });
  show();
}
