"use strict";
// What the pages for raters and reviewers and the report share. Text of others comes into a page as textContent alone.

function element(name, parent, text = "", properties = {}) {
  const node = document.createElement(name);
  node.textContent = text;
  Object.assign(node, properties);
  parent.append(node);
  return node;
}

