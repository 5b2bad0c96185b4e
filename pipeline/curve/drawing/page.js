"use strict";
(() => {
  const content = JSON.parse(document.getElementById("data").textContent);
  const sections = [...document.querySelectorAll(".view")];
  const isNarrow = () => window.innerWidth <= 600;
  const drawn = sections.map(() => null);

  function describe(number, index) {
    const title = sections[number].querySelectorAll("h3")[index].textContent;
    return `${title}, ${sections[number].getAttribute("aria-label")}; the table below has the same numbers`;
  }

  function draw(number) {
    const { charts, data } = content.views[number];
    const config = structuredClone(content.config);
    if (isNarrow()) config.legend.columns = 1;
    return content.charts[charts].map((spec, index) =>
      vegaEmbed(`#chart-${number}-${index}`, { ...spec, datasets: data, description: describe(number, index) }, {
        actions: false, ast: true, config, logLevel: 1, renderer: "svg", tooltip: { theme: "none" },
      }).then(({ view }) => view)
    );
  }

  // Sets a signal of the view's charts that have it.
  function send(number, name, value) {
    for (const chart of drawn[number] ?? [])
      chart.then((view) => { if (name in view.getState().signals) view.signal(name, value).runAsync(); });
  }

  function show(number) {
    sections.forEach((section, index) => { section.hidden = index !== number; });
    drawn[number] ??= draw(number);
    send(number, "narrow", isNarrow());
    window.dispatchEvent(new Event("resize"));
  }

  function sort(table, column) {
    const header = table.tHead.rows[0].cells[column];
    const isDown = header.getAttribute("aria-sort") === "ascending";
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", isDown ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.key ?? row.dataset.name;
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    const rows = [...table.tBodies[0].rows].sort((one, other) => {
      const [left, right] = [key(one), key(other)];
      const difference = left - right;
      return (Number.isNaN(difference) ? compare(left, right) : difference) * (isDown ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  }

  sections.forEach((section, number) => {
    const table = section.querySelector("table");
    table.tHead.addEventListener("click", (event) => {
      const cell = event.target.closest("th");
      if (cell) sort(table, cell.cellIndex);
    });
    table.tBodies[0].addEventListener("pointerover", (event) => send(number, "picked", event.target.closest("tr").dataset.name));
    table.tBodies[0].addEventListener("pointerleave", () => send(number, "picked", ""));
  });
  const picker = document.getElementById("view");
  picker?.addEventListener("change", () => show(Number(picker.value)));
  let timer;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => drawn.forEach((_, number) => send(number, "narrow", isNarrow())), 200);
  });
  show(picker ? Number(picker.value) : 0);
})();
