// What the theme leaves out for those who use a keyboard or a screen reader.
"use strict";
(() => {
  // What scrolls sideways can be scrolled with the keyboard too: tables, outputs and formulas wider than the page.
  const boxes = ".bd-article :is(table, pre, .cell_output, .output, .pst-scrollable-table-container, div.math)";
  const reach = () => {
    for (const box of document.querySelectorAll(boxes)) {
      const scrolls = box.scrollWidth > box.clientWidth && ["auto", "scroll"].includes(getComputedStyle(box).overflowX);
      if (scrolls) box.tabIndex = 0;
    }
  };
  // docutils gives the entries of a bibliography a role that a list may not hold.
  const list = () => {
    for (const entry of document.querySelectorAll("[role=list] > [role=doc-biblioentry]")) entry.setAttribute("role", "listitem");
  };
  document.addEventListener("DOMContentLoaded", reach);
  document.addEventListener("DOMContentLoaded", list);
  window.addEventListener("load", reach);
  window.addEventListener("resize", reach);
})();
