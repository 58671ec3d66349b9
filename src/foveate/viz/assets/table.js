/** Tables whose column heads sort: numbers from the best or largest first, text by the alphabet, "n/a" always last. */

function compared(a, b, isNumber) {
  if (!isNumber) return a.localeCompare(b, undefined, { numeric: true });
  return Number(a) - Number(b);
}

/** Makes every head of a table with a button sort its rows. */
export function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (button === null) return;
    button.addEventListener("click", () => {
      const isDown = head.getAttribute("aria-sort") === "descending";
      const direction = head.hasAttribute("aria-sort") ? (isDown ? "ascending" : "descending") : head.dataset.first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      sort(table, column, direction === "descending");
    });
  });
}

function sort(table, column, isDown) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, key: row.cells[column].dataset.value }));
  const isNumber = rows.every(({ key }) => key === undefined || key === "" || Number.isFinite(Number(key)));
  const known = rows.filter(({ key }) => key !== undefined && key !== "");
  known.sort((a, b) => (isDown ? -1 : 1) * compared(a.key, b.key, isNumber));
  body.append(
    ...known.map(({ row }) => row),
    ...rows.filter(({ key }) => key === undefined || key === "").map(({ row }) => row),
  );
}
