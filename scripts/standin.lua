-- What pandoc lacks of Quarto: callouts, folded code, numbered references, links between notebooks.
local titles = {note = "Note", tip = "Tip", warning = "Warning", important = "Important", caution = "Caution"}
local words = {fig = "Figure", tbl = "Table", eq = "Equation"}
local counts, numbers = {fig = 0, tbl = 0, eq = 0}, {}

local function number(id)  -- the number of a labelled figure, table or equation
  local kind = id:match("^(%a+)-")
  if words[kind] and not numbers[id] then
    counts[kind] = counts[kind] + 1
    numbers[id] = words[kind] .. " " .. counts[kind]
  end
  return numbers[id]
end

local function callout(div)  -- ::: {.callout-note title="..."} becomes a titled aside
  for _, class in ipairs(div.classes) do
    local kind = class:match("^callout%-(%a+)")
    if kind then
      local head = div.content[1]
      local title = pandoc.Inlines(div.attributes.title or titles[kind] or kind)
      if head and head.t == "Header" then title = head.content; div.content:remove(1) end
      local box = pandoc.Div({pandoc.Para({pandoc.Strong(title)})}, pandoc.Attr(div.identifier, {"callout", kind}))
      box.content:extend(div.content)
      return box
    end
  end
end

local function fold(div)  -- ::: {.fold} becomes a closed or open <details>
  if not div.classes:includes("fold") then return nil end
  local open = div.attributes.open == "true" and " open" or ""
  local out = pandoc.Blocks({pandoc.RawBlock("html", "<details" .. open .. "><summary>" .. (div.attributes.summary or "Code") .. "</summary>")})
  out:extend(div.content)
  out:insert(pandoc.RawBlock("html", "</details>"))
  return out
end

local function captioned(div)  -- a labelled cell: its caption gets the number
  local last = div.content[#div.content]
  if number(div.identifier) and last and last.t == "Div" and last.classes:includes("figcaption") then
    last.content[1].content:insert(1, pandoc.Str(number(div.identifier) .. ". "))
    return div
  end
end

local function equation(para)  -- $$ ... $$ {#eq-name}
  local last = para.content[#para.content]
  local id = last and last.t == "Str" and last.text:match("^{#(eq%-[%w-]+)}$")
  if not id then return nil end
  para.content:remove(#para.content)
  para.content:insert(pandoc.Str(" (" .. number(id):match("%d+") .. ")"))
  return pandoc.Div({para}, pandoc.Attr(id, {"equation"}))
end

local function labelled(element)  -- a figure or table with an id gets its number before its caption
  local caption = element.caption and element.caption.long
  if number(element.identifier) and caption and #caption > 0 then
    caption[1].content:insert(1, pandoc.Str(number(element.identifier) .. ". "))
  end
  return element
end

local function reference(cite)  -- @fig-name
  local id = cite.citations[1].id
  if words[id:match("^(%a+)-") or ""] then return pandoc.Link(numbers[id] or ("?" .. id), "#" .. id) end
end

local function pictured(image)  -- Quarto's fig-alt
  if image.attributes["fig-alt"] then
    image.caption, image.attributes["fig-alt"] = pandoc.Inlines(image.attributes["fig-alt"]), nil
    return image
  end
end

local function language(block)  -- pandoc seeks names that it does not know in all its syntaxes, for a second on each page
  local class = block.classes[1]
  if class == "sh" then block.classes[1] = "bash" elseif class == "text" then block.classes:remove(1) end
  return block
end

return {{Image = pictured, CodeBlock = language, Div = function(div) return callout(div) or fold(div) or captioned(div) end, Para = equation, Figure = labelled, Table = labelled}, {Cite = reference}}
