"use strict";
// Values at the points of the plots, and the table of all rows. Without this script points have titles, and the table
// stands as it is.
(() => {
  const tip = document.getElementById("tip");

  function show(circle) {
    document.querySelectorAll(".values .on").forEach((c) => c.classList.remove("on"));
    if (!circle) { tip.hidden = true; return; }
    circle.classList.add("on");
    tip.textContent = circle.dataset.words;
    tip.hidden = false;
    const at = circle.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(at.left + at.width / 2 - tip.offsetWidth / 2, width - tip.offsetWidth - 8));
    const above = at.top - tip.offsetHeight - 8;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above < 0 ? at.bottom + 8 : above) + scrollY}px`;
  }

  const REACH = 24; // pixels from the pointer to a point
  for (const plot of document.querySelectorAll(".plot")) {
    const circles = [...plot.querySelectorAll(".values circle")];
    if (!circles.length) continue;
    // a phone's drawing has the points of the wide one before it, in the same order
    const words = plot.classList.contains("for-phone")
      ? [...plot.previousElementSibling.querySelectorAll(".values circle")].map((c) => c.dataset.words) : null;
    circles.forEach((c, i) => {
      const title = c.querySelector("title");
      c.dataset.words = words ? words[i] : title.textContent;
      title?.remove(); // the browser would show it as well
    });
    const nearest = (event) => {
      let best = null, least = REACH;
      for (const c of circles) {
        const box = c.getBoundingClientRect();
        const away = Math.hypot(box.left + box.width / 2 - event.clientX, box.top + box.height / 2 - event.clientY);
        if (away < least) { least = away; best = c; }
      }
      show(best);
    };
    plot.addEventListener("pointermove", nearest);
    plot.addEventListener("pointerdown", nearest);
    plot.addEventListener("pointerleave", () => show(null));
    plot.tabIndex = 0; // arrow keys step through the points
    let at = -1;
    plot.addEventListener("blur", () => show(null));
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      at = (at + step + circles.length) % circles.length;
      show(circles[at]);
    });
  }

  const table = document.querySelector("table.rows");
  const form = document.getElementById("filter");
  if (!table || !form) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
      };
      const order = (a, b) => typeof a === "number" && typeof b === "number"
        ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      rows.sort((a, b) => (down ? -1 : 1) * order(key(a), key(b)));
      body.append(...rows);
    });
  });

  const count = document.getElementById("shown");
  function apply() {
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const selects = [...form.querySelectorAll("select")].filter((s) => s.value);
    let shown = 0;
    for (const row of rows) {
      const fits = words.every((word) => texts.get(row).includes(word))
        && selects.every((s) => row.cells[s.dataset.column].textContent === s.value);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }
  for (const select of form.querySelectorAll("select")) {
    const values = new Set(rows.map((row) => row.cells[select.dataset.column].textContent));
    for (const value of [...values].sort()) select.append(new Option(value, value));
  }
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  form.hidden = false;
  apply();
})();
