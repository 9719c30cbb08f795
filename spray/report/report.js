"use strict";

// Lists of samples are saved by the browser itself: nothing leaves the page.
function save(name, format, rows) {
  const text = format === "csv" ? csv(rows) : JSON.stringify(rows, null, 1) + "\n";
  const type = format === "csv" ? "text/csv;charset=utf-8" : "application/json";
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = Object.assign(document.createElement("a"), { href: address, download: name + "." + format });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

// RFC 4180; every text stands in quotes, whatever is in it. A name that a spreadsheet would take for a formula, which can
// run programs, gets an apostrophe before it, unless it is nothing but a number: as spray/csvs.py has it.
const FORMULA = /^'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/, NUMBER = /^[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?$/;
const guarded = text => FORMULA.test(text) && !NUMBER.test(text) ? "'" + text : text;

function csv(rows) {
  const columns = rows.length ? Object.keys(rows[0]) : [];
  const cell = value => typeof value === "string" ? '"' + guarded(value).replace(/"/g, '""') + '"' : String(value ?? "");
  return [columns, ...rows.map(row => columns.map(column => row[column]))].map(row => row.map(cell).join(",") + "\n").join("");
}

// A table whose rows are all in the page, more than are shown.
for (const button of document.querySelectorAll("button[data-table]")) {
  button.addEventListener("click", () => {
    const table = JSON.parse(document.getElementById(button.dataset.table).textContent);
    const rows = table.rows.map(row => Object.fromEntries(table.columns.map((column, i) => [column, row[i]])));
    save(table.name, button.dataset.format, rows);
  });
}

for (const button of document.querySelectorAll("button[data-list]")) {
  button.addEventListener("click", () => {
    const list = JSON.parse(document.getElementById(button.dataset.list).textContent);
    const rows = list.samples.map((sample, i) => {
      const row = { sample_index: sample, name: list.names[i], class: list.class_name };
      return list.scores ? { ...row, score: list.scores[i] } : row;
    });
    save("artifact-" + list.artifact, button.dataset.format, rows);
  });
}
